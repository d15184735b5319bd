"""Imported for what it does: kernels in TIRx are parsed in less than half the time.

TVM looks at all frames, together with the text of their sources, at every call of an inline
function and for every buffer of a part of a kernel; one frame is enough. It parses the text of an
inline function at every call, and compiles every name to know its value.
"""

from __future__ import annotations

import inspect

from tvm.script.parser.core import doc, evaluator, parser
from tvm.tirx.script.builder import ir

__all__: list[str] = []


def _parser_at_work(macro):
    """The parser is in the nearest frame of a module that has it."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_globals.get(parser.ScriptMacro.parser_object_name)
        if found is not None:
            return found
        frame = frame.f_back
    return _find_parser_def(macro)


def _definition(macro):
    """The tree is kept, unless a visit changes it: functions lose their decorators there."""
    kept = vars(macro).get("_im2win_definition")
    if kept is None:
        kept = _get_macro_def(macro)
        text = macro.source.source
        if text.count("def ") == 1 and "+=" not in text:  # targets are read, then written
            macro._im2win_definition = kept
    return kept


def _record_nearest(value, skip_frames=2):
    """What made a buffer is the nearest frame outside of the builder."""
    scope = ir._current_meta_construction_scope()
    if scope is None:
        return
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename in (__file__, ir.__file__):
        frame = frame.f_back
    if frame is None:
        _record_meta_resource(value, skip_frames)
    else:
        scope.record(value, inspect.getframeinfo(frame, context=1))


def _value(node, dict_globals):
    """Of a name, an intermediate result mostly, or of an attribute of one."""
    name = node.value if type(node) is doc.Attribute else node
    if type(name) is not doc.Name or name.id not in (dict_globals or ()):
        return _eval_expr(node, dict_globals)
    value = dict_globals[name.id]
    return value if node is name else getattr(value, node.attr)


def _replace(owner, name, function):
    """Returns what was there: without it this is another TVM, which is left alone."""
    before = getattr(owner, name, None)
    if before is not None:
        setattr(owner, name, function)
    return before


_find_parser_def = _replace(parser.ScriptMacro, "_find_parser_def", _parser_at_work)
_get_macro_def = _replace(parser.ScriptMacro, "get_macro_def", _definition)
_record_meta_resource = _replace(ir, "_record_meta_resource", _record_nearest)
_eval_expr = _replace(evaluator, "_eval_expr", _value)
