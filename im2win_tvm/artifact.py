"""The file format of an exported kernel, and the checks before anything in it runs.

An artifact is an ordinary shared library that carries, in its read-only data, a header of
HEADER_BYTES (magic, file size, SHA-256 of the file, length) and then JSON. Everything is checked
by reading the file; only then is it handed to the dynamic loader, which would crash on a library
that is cut short and would run the initialisers of one that is not ours.
"""

import hashlib
import json
import os
import platform
import shutil
import struct
import tempfile
from pathlib import Path

from .cuda_driver import compute_capability
from .target import missing_cpu_features

FORMAT = 1
MAGIC = b"\x89im2win kernel\r\n\x1a"[:16]
_HEADER = struct.Struct("<16sQ32sQ")
HEADER_BYTES = _HEADER.size
# What loading and calling read of the metadata.
_NEEDED = (
    "problem", "epilogue", "schedule", "target", "prepare", "prepare_hash", "calls", "arguments",
    "workspaces", "scratch_bytes_per_thread",
)  # fmt: skip
_UNSEALED = (0, b"\0" * 32)


class ArtifactError(RuntimeError):
    """A file that is not a kernel, is damaged, or is for another machine; the text says which."""


def metadata_source(metadata: dict) -> str:
    """C source of the header and JSON, to be linked into the library and sealed afterwards."""
    text = json.dumps(metadata, sort_keys=True).encode()
    data = _HEADER.pack(MAGIC, *_UNSEALED, len(text)) + text + b"\0"
    signed = ",".join(str(byte - 256 if byte > 127 else byte) for byte in data)
    return f"const char im2win_artifact[] = {{{signed}}};\n"


def seal(path: Path) -> None:
    """Write the file's size and digest into its header."""
    data = bytearray(path.read_bytes())
    start = data.find(MAGIC)
    magic, _, _, length = _HEADER.unpack_from(data, start)
    _HEADER.pack_into(data, start, magic, len(data), _UNSEALED[1], length)
    digest = hashlib.sha256(data).digest()
    _HEADER.pack_into(data, start, magic, len(data), digest, length)
    path.write_bytes(data)


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata of an exported kernel. Runs nothing from the file.

    Raises ArtifactError if the file is missing, not a shared library, not exported by this
    project, cut short, altered since, or written in a format this version does not know.
    """
    path = Path(path)
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:4] != b"\x7fELF":
        raise ArtifactError(f"{path}: not a shared library (no ELF header)")
    start = data.find(MAGIC)
    if start < 0 or start + HEADER_BYTES > len(data):
        raise ArtifactError(
            f"{path}: no im2win_tvm metadata: not exported by Kernel.export, or cut short"
        )
    magic, size, digest, length = _HEADER.unpack_from(data, start)
    if size != len(data):
        raise ArtifactError(f"{path}: cut short or extended: {len(data)} bytes, exported as {size}")
    _HEADER.pack_into(data, start, magic, size, _UNSEALED[1], length)
    if hashlib.sha256(data).digest() != digest:
        raise ArtifactError(f"{path}: altered since it was exported (SHA-256 differs)")
    body = start + HEADER_BYTES
    metadata = json.loads(data[body : body + length])
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: format={metadata.get('format')!r}: this version reads {FORMAT}; "
            f"exported by im2win_tvm {metadata.get('versions', {}).get('im2win_tvm')}"
        )
    missing = [key for key in _NEEDED if key not in metadata]
    if missing:
        raise ArtifactError(f"{path}: {', '.join(missing)} missing in the metadata")
    return metadata


def check_machine(metadata: dict, path: str | os.PathLike) -> None:
    """Raise ArtifactError if a kernel with this metadata cannot run on this machine."""
    target = metadata["target"]
    if target["machine"] != platform.machine():
        raise ArtifactError(
            f"{path}: machine={target['machine']!r}: this machine is {platform.machine()!r}"
        )
    if target["kind"] == "llvm":
        missing = missing_cpu_features(tuple(target["features"]))
        if missing:
            raise ArtifactError(
                f"{path}: built for cpu={target['cpu']!r}: this processor lacks "
                f"{', '.join(missing)}"
            )
        return
    capability = compute_capability()
    if capability is None:
        raise ArtifactError(
            f"{path}: built for CUDA arch={target['arch']!r}: there is no CUDA device here"
        )
    if not runs_on(target["arch"], capability):
        raise ArtifactError(
            f"{path}: built for CUDA arch={target['arch']!r}: this device is "
            f"sm_{capability[0]}{capability[1]}"
        )


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` runs on a device of this compute capability.

    CUDA C++ Programming Guide, binary compatibility: within a major version, from the same minor
    version on; an architecture-specific target (``sm_90a``) only on exactly its own.
    """
    digits = arch.removeprefix("sm_").rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if arch.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


def copy_atomically(source: Path, destination: str | os.PathLike) -> Path:
    """Copy a file so that the destination is either absent, as it was, or complete."""
    destination = Path(destination)
    handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    os.close(handle)
    try:
        shutil.copyfile(source, temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        os.replace(temporary, destination)
    except BaseException:
        os.unlink(temporary)
        raise
    return destination
