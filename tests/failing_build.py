"""A build that ends its process or copies a kernel; without TVM, which takes seconds to import."""

import os
import shutil


def build_to(request, path):
    """In place of `builds._build_to`; a request is the kernel's file, or None for the end."""
    if request is None:
        os._exit(3)
    shutil.copy(request, path)
