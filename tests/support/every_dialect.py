"""A client of every wire language; a further dialect adds its line here."""

from tests.support import a1111_calls, iopaint_calls, openai_calls, replicate_calls, vendor_calls
from tests.support.dialect_calls import NATIVE_CALLS, V3_CALLS, DialectCalls

OTHER_CALLS: tuple[DialectCalls, ...] = (
    V3_CALLS,
    *vendor_calls.CALLS,
    a1111_calls.CALLS,
    openai_calls.CALLS,
    replicate_calls.CALLS,
    iopaint_calls.CALLS,
)
"""All but the native API, with which the others are compared."""

EVERY_CALLS = (NATIVE_CALLS, *OTHER_CALLS)
