"""Guards whose removal no program can show, each with the reason. Keys are ``Mutant.key``."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    "match.polynomial.value_of: allows: len(poly) == 1":
        "build sorts the constant term last, so it stands first only when it is alone",
    "match.engine._step: allows: isinstance(node.args[0], fx.Node)":
        "only views, items and in-place operations look at the first argument, which is a node in all of them",
    "match.slots._cut: allows: isinstance(size, int)":
        "column_of asks the same of the last size of the root, which is the size of this dimension",
    "match.slots._cut: gives_up: getattr(node.target, '__name__', '') != 'getitem'":
        "nothing but getitem reads the list that a split gives: the tracer takes every list apart",
    "match.slots._cut: allows: isinstance(index, int)":
        "the place in the list that a split gives is a plain number (that of select is tested)",
    "match.slots.merge_slots: allows: gate is not None":
        "a part without rows has a gate: combine.term and combine.sum_over make no sum without one",
    "match.stack.stacked_values: gives_up: len(v.slots) != len(first.slots)":
        "an expression names every weight of its value, so equal expressions come with equally many",
    "match.shrunk._pairs: gives_up: len(model.slots) != len(other.slots)":
        "an expression names every weight of its value, so equal expressions come with equally many",
    "match.scatter._index_put: allows: found is not None":
        "a mask that gives no rows has an e or an r dimension, so assign leaves it before it reads the rows",
    "match.scatter._combine_matrix: gives_up: found is None":
        "is_token_range has found the ids of the same node just before",
    "match.gathered.per_token_by_ids: gives_up: found is None":
        "the only caller has asked is_token_range, which found the ids of the same node",
    "match.gathered.gathered_weight: gives_up: weight.source != 'axis'":
        "only a weight of source axis has a first dimension e: a taken row loses it, gathered weights replace it",
    "match.pairs.assign: gives_up: rows.slot is not None":
        "rows of one slot have no slot dimension and K > 1, so no index of them names a pair and assign is not reached",
    "match.pairs.assign: gives_up: e is None":
        "rows_of_mask and segment give rows of kind hit their expert",
    "match.pairs.assign: gives_up: other.rows is None":
        "a piece was stored with the rows that it was assigned at",
    "match.rows.rows_of_mask: gives_up: gate.expert is None":
        "a gate of a node names one expert exactly when it has no e dimension, which is asked as well",
    "match.rows.rows_of_mask: gives_up: 'e' in flat_names(gate.dims)":
        "a gate of a node names one expert exactly when it has no e dimension, and the expert is asked as well",
    "match.combine._add: gives_up: not isinstance(other, fx.Node)":
        "is_float, asked of the same, is False for whatever is no node",
    "planning._output: allows: writes(node.target)":
        "beside its write an item assignment makes only views of what it is given, and no view completes a sum",
    "match.labels._unify_tokens: gives_up: not mine":
        "no atom has size one, so no tokens at all are never as many as some, and with none on both sides names differ",
    "match.labels._unify_tokens: gives_up: not theirs":
        "no atom has size one, so no tokens at all are never as many as some, and with none on both sides names differ",
    "match.labels._unify_tokens: gives_up: x[:len(mine)] != mine":
        "a token behind other atoms is left among the rest, whose names then differ from the other side's",
    "match.labels._unify_tokens: gives_up: y[:len(theirs)] != theirs":
        "a token behind other atoms is left among the rest, whose names then differ from the other side's",
    "match.facts.counts_pairs: allows: gate.expert is None":
        "all callers ask for an e dimension, and a gate of one expert has none: every rule that sets expert drops it",
    "match.nodes.is_pure: allows: not schema.is_mutable":
        "the second of two calls reads a later version of what the first wrote, so their keys differ anyway",
    "match.layer._one_expression: gives_up: val.rows is not None and val.rows.kind != 'sorted'":
        "rows without an expert are only made in sorted order: rows_of_mask and segments name their expert",
    "match.layer._one_expression: gives_up: len(v.slots) != len(parts[0].val.slots)":
        "an expression names every slot of its value, so equal expressions have as many",
    "match.groups._in_order: gives_up: len(v.slots) != len(first.slots)":
        "an expression names every slot of its value, so equal expressions have as many",
    "match.layer._needs_distinct: allows: part.val.rows is not None":
        "a part without a gate is one of rows: sums over tokens ask for a gate, or make one",
    "match.expert._known: allows: not act.gated":
        "an activation is gated only where it reads the up leaf, which is not among the leaves here",
    "match.expert._known: allows: rows == inter":
        "steps without a cut keep the width of the one map they read, and linear_map compares it with the next one's",
    "match.routing.ids_dims: gives_up: not is_integer(node)":
        "the leaf under the views must be ids, and a cast of them to anything but an id dtype has no fact",
    "match.routing._one_hot: gives_up: not isinstance(count, int)":
        "aten.one_hot takes a plain int, and its default, which depends on the data, cannot be traced",
    "match.values.lift: allows: not isinstance(outer, list)":
        "a list is the fact of chunk, split and unbind, whose results only getitem reads, which is never peeled",
    "match.values.x_rows: allows: isinstance(found, Val)":
        "lift finds what x_leaf made under views of an unknown or finished value, and a view of a Val is one too",
    "match.views.take: allows: isinstance(size, int)":
        "callers know the size of the dimension as a number; a label counted by a node equals no number",
    "match.views.take: allows: fact.expert is None":
        "a gate of one expert has no e dimension: every rule that sets expert drops it",
    "match.views.take: allows: fact.source == 'axis'":
        "gathering, selecting and merging replace e where they change the source, so a weight with e is an axis",
    "patterns.grouped_mm._grouped_mm: gives_up: w.source != 'axis'":
        "gathering, selecting and merging replace e where they change the source, so a weight with e is an axis",
    "patterns.grouped_mm._take_ids: gives_up: len(indices) != 1":
        "what follows wants a range or ids of one dimension, which take no second index",
    "match.engine._is_plain: allows: val.rows is None":
        "rows have an r dimension, or are the one row of the one token",
    "match.gathered.all_by_ids: gives_up: val.rows is not None":
        "token_major refuses the label of rows, and ids have none that gather could find equal",
    "match.values.linear_map: gives_up: any((not a.name.startswith(('t', 'k', 'e', 'r', 'f', '*')) "
    "for d in dims for a in d))":
        "a value has one feature dimension, f (asked of the summed one) or fo with fi, a weight one w0 and one w1",
    "match.scatter._scatter_sum: gives_up: rank(target) != 2":
        "the operation takes a target of the rank of its source, whose rows _accumulate asks for",
    "legality._needed_elsewhere: refuses: refuse('MC203', f\"{node.name}, a step of the layer's sum, is also "
    'needed elsewhere", node)':
        "a step that reads a partial sum is a sum or a picked one, which _nothing_used_outside refuses before",
}  # fmt: skip
