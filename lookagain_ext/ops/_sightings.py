"""Who sees what in a call with many queries, cut into pieces for a library's attention.

A *row* is one of a batch, or one of several sequences packed into a batch of one. The *plain* piece
of a row: its own keys, seen causally by its last queries. Beside it a row has *segments*: runs of
queries between the starts of its re-injections, each of which sees all tokens shown up to there, a
rectangle without a mask. Reading the layout takes one copy of small index tensors to the host;
without re-injections and padding there is none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..visual import NEVER
from ._fused_attention import Sequences

Fields = tuple[Tensor | None, ...]  # key_start, key_length, spans, inv_freq, shift, start, selected


@dataclass(frozen=True, eq=False)
class Pair:
    """One re-injection of one row."""

    source: int  # row, in the index tensors
    row: int  # of the batch
    first: int  # query that sees it; all later ones of the row do
    number: int  # of the re-injection
    runs: tuple[tuple[int, int], ...] | None  # (first key, length); None: `index` tells
    count: int  # of tokens shown
    index: Tensor | None = None  # int64 [count], their keys


@dataclass(frozen=True, eq=False)
class Again:
    """All re-injections of a call, for one call of the library.

    Attributes:
        rows: (row of the batch, first query that sees one, end of the row's queries), for each row
            with one. The queries of the library's call are these, behind each other.
        pairs: by row, then by the query that they begin at. The *shown* tokens are those of each
            pair, behind each other.
        seen: for each segment the (first, end) of the shown tokens that it sees.
        sequences: the segments; None for a single one.
        cosine: float32 [shown tokens, half], of each one's shift.
        sine: likewise.
    """

    rows: tuple[tuple[int, int, int], ...]
    pairs: tuple[Pair, ...]
    seen: tuple[tuple[int, int], ...]
    sequences: Sequences | None
    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """The pieces of a call.

    Attributes:
        keys: (first, end) of the keys that every query may see, where all rows are alike; then the
            plain piece is one batch.
        plain: else the rows' pieces, with a sequence for each gap: queries [B L_q], keys [B L_k].
        again: the re-injections.
    """

    keys: tuple[int, int] | None
    plain: Sequences | None
    again: Again | None = None


class _Place(NamedTuple):
    """Where a row's queries and keys lie in the batch."""

    row: int
    query: int
    queries: int
    key: int
    keys: int


def read_layout(
    query: Tensor, key: Tensor, fields: Fields, bounds: tuple[int, ...] | None = None
) -> Layout:
    """The layout of a call.

    Args:
        query: [B, H_q, L_q, D]; only its shape and device are read.
        key: [B, H_kv, L_k, D], likewise.
        fields: int32 key_start and key_length [B] or None, then those of a `VisualContext` or None.
        bounds: of packed sequences, B = 1: where each begins, and the end of the last. What has a
            row for each of B otherwise has one for each sequence then.
    """
    key_start, key_length, spans, _, shift, *_ = fields
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    again = spans is not None and shift.shape[1] > 0 and spans.shape[1] > 0
    if bounds is None:
        if key_start is None and key_length is None and not again and queries <= keys:
            return Layout((0, keys), None)
        places = [_Place(row, 0, queries, 0, keys) for row in range(batch)]
    else:
        places = [_Place(0, a, b - a, a, b - a) for a, b in pairwise(bounds)]
    shown = _shown_tokens(places, fields) if again and fields[6] is not None else None
    starts, lengths, rows = _on_host(places, fields, again, shown)
    seen = []
    for place, start, length in zip(places, starts, lengths, strict=True):
        end = min(max(length, 0), place.keys)
        seen.append((min(max(start, 0), end), end))
    alike = bounds is None and len(set(seen)) == 1 and seen[0][1] - seen[0][0] >= queries
    plain = None if alike else _plain_sequences(places, seen, query.device)
    pairs = _pairs(places, rows, [end for _, end in seen], shown) if again else []
    return Layout(seen[0] if alike else None, plain, _again(pairs, places, fields))


def _shown_tokens(places: list[_Place], fields: Fields) -> tuple[Tensor, Tensor]:
    """Of a selection: int64 [B, R, L_c] keys, those shown first, and int64 [B, R] how many are."""
    keys = [place.keys for place in places]
    _, key_length, spans, _, _, _, selected = fields
    first, length = spans.long().unbind(-1)
    number = torch.arange(selected.shape[-1], device=spans.device)
    number = number.expand(first.shape[0], -1).contiguous()
    end = length.cumsum(-1)
    span = torch.searchsorted(end, number, right=True)
    inside = span < first.shape[1]
    token = (first - (end - length)).gather(1, span.clamp(max=first.shape[1] - 1)) + number
    if len(set(keys)) > 1:
        limit = torch.tensor(keys).to(spans.device)[:, None]
    else:
        limit = keys[0] if key_length is None else key_length.clamp(max=keys[0])[:, None]
    shown = selected & (inside & (token >= 0) & (token < limit))[:, None]
    order = shown.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return token[:, None].expand_as(order).gather(-1, order), shown.sum(-1)


def _on_host(
    places: list[_Place], fields: Fields, again: bool, shown: tuple[Tensor, Tensor] | None
) -> tuple[list[int], list[int], list[tuple]]:
    """key_start, key_length, and (spans, start, tokens shown) of each row: one copy."""
    key_start, key_length, spans, _, _, start, _ = fields
    tensors = [x for x in (key_start, key_length) if x is not None]
    if again:
        tensors += [spans, start] + ([] if shown is None else [shown[1]])
    batch = len(places)
    starts, lengths = [0] * batch, [place.keys for place in places]
    if not tensors:
        return starts, lengths, []
    flat = torch.cat([x.reshape(batch, -1).to(torch.int32) for x in tensors], 1).tolist()
    if key_start is not None:
        starts = [row.pop(0) for row in flat]
    if key_length is not None:
        lengths = [row.pop(0) for row in flat]
    rows = []
    for row in flat if again else ():
        width = 2 * spans.shape[1]
        runs = list(zip(row[:width:2], row[1:width:2], strict=True))
        rows.append((runs, row[width : width + start.shape[1]], row[width + start.shape[1] :]))
    return starts, lengths, rows


def _plain_sequences(
    places: list[_Place], seen: list[tuple[int, int]], device: torch.device
) -> Sequences:
    lengths = []
    for place, (start, end) in zip(places, seen, strict=True):
        seeing = min(place.queries, end - start)
        lengths += [(place.queries - seeing, 0), (0, start)]
        lengths += [(seeing, end - start), (0, place.keys - end)]
    return Sequences.of([pair for pair in lengths if pair != (0, 0)], device)


def _pairs(
    places: list[_Place], rows: list[tuple], ends: list[int], shown: tuple[Tensor, Tensor] | None
) -> list[Pair]:
    pairs = []
    for source, (place, (runs, starts, counts)) in enumerate(zip(places, rows, strict=True)):
        cut = [(max(a, 0), min(a + n, ends[source])) for a, n in runs]
        kept = tuple((place.key + a, end - a) for a, end in cut if end > a)
        for number, start in enumerate(starts):
            first = min(max(start - (ends[source] - place.queries), 0), place.queries)
            count = sum(n for _, n in kept) if shown is None else counts[number]
            if start == NEVER or first == place.queries or count == 0:
                continue
            where = (source, place.row, place.query + first, number)
            if shown is None:
                pairs.append(Pair(*where, kept, count))
            else:
                index = shown[0][source, number, :count] + place.key
                pairs.append(Pair(*where, None, count, index))
    return pairs


def _again(pairs: list[Pair], places: list[_Place], fields: Fields) -> Again | None:
    if not pairs:
        return None
    pairs = sorted(pairs, key=lambda pair: (pair.source, pair.first, pair.number))
    rows, seen, lengths = [], [], []
    place = 0
    for source in sorted({pair.source for pair in pairs}):
        mine = [pair for pair in pairs if pair.source == source]
        last = places[source].query + places[source].queries
        rows.append((mine[0].row, mine[0].first, last))
        firsts = sorted({pair.first for pair in mine})
        for first, end in zip(firsts, [*firsts[1:], last], strict=True):
            shown = sum(pair.count for pair in mine if pair.first <= first)
            seen.append((place, place + shown))
            lengths.append((end - first, shown))
        place += sum(pair.count for pair in mine)
    inv_freq, shift = fields[3], fields[4]
    angle = shift[..., None].double() * inv_freq.double()
    table = torch.stack([angle.cos(), angle.sin()]).float()
    turns = [table[:, p.source, p.number, None].expand(-1, p.count, -1) for p in pairs]
    cosine, sine = torch.cat(turns, 1).unbind()
    sequences = Sequences.of(lengths, shift.device) if len(lengths) > 1 else None
    return Again(tuple(rows), tuple(pairs), tuple(seen), sequences, cosine, sine)


class LayoutCache:
    """Layouts of the last calls: the layers of a training step share theirs.

    An entry holds the index tensors that it was read from and is good while the very same objects
    come, unchanged.
    """

    def __init__(self, size: int = 64) -> None:
        self._entries: OrderedDict[tuple, tuple[list, Layout]] = OrderedDict()
        self._size = size
        self._lock = threading.Lock()  # each device has a backward thread of its own

    def read(
        self, query: Tensor, key: Tensor, fields: Fields, bounds: tuple[int, ...] | None = None
    ) -> Layout:
        """As `read_layout`."""
        tensors = [x for x in fields if x is not None]
        if any(x.is_inference() for x in tensors):
            return read_layout(query, key, fields, bounds)
        shapes = (query.device, query.shape[0], query.shape[2], key.shape[2])
        name = (*shapes, bounds, *map(id, fields))
        now = [(x, x._version) for x in tensors]
        with self._lock:
            held = self._entries.pop(name, None)
            if held is None or any(version != x._version for x, version in held[0]):
                held = now, read_layout(query, key, fields, bounds)
            self._entries[name] = held
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
            return held[1]
