"""Rows that are a conversation: `messages` as chat APIs have them, and ShareGPT's `conversations`."""

from __future__ import annotations

from qcrd_fast.data.formats import columns, golds
from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.formats.samples import is_cut, row_is_cut
from qcrd_fast.data.formats.turns import as_list, exchange, is_turns
from qcrd_fast.data.schema import Rationale, RowError


def read(row: Row) -> Parsed:
    """Read a conversation's question, and its reply as a sample. Without a reply, other columns may hold samples.

    Raises:
        RowError: it is no conversation of one question and at most one reply.
    """
    key = row.key("messages")
    if key is None:
        raise RowError("missing key 'messages'")
    turns = as_list(row.take(key))
    if not is_turns(turns):
        raise RowError(f"{key} expects a list of messages with role and content (or from and value)")
    question, reply, system = exchange(turns, key)
    if question is None:
        raise RowError(f"{key} has no turn of the user")
    if reply is None:
        return columns.read(row, question)
    if system:
        row.parts.add(f"{key}[system]")
    asked = golds.make_question(row, question)
    cut = is_cut(turns[-1]) or row_is_cut(row)
    return Parsed(asked, (Rationale(reply, None, golds.source(row), reply=True, truncated=cut),), unread=row.unread())
