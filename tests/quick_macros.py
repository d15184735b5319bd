"""Imported for what it does: inline functions of TIRx are parsed in half the time.

TVM looks for the parser at work in all frames together with the text of their sources.
"""

import inspect

from tvm.script.parser.core.parser import ScriptMacro


def _parser_at_work(macro):
    frame = inspect.currentframe()
    while ScriptMacro.parser_object_name not in frame.f_globals:
        frame = frame.f_back
    return frame.f_globals[ScriptMacro.parser_object_name]


ScriptMacro._find_parser_def = _parser_at_work
