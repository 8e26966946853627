"""What a site's records are, to a plan or to none: counts for the site alone, or the record that is wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from participant.base_model import check_base, find_base
from participant.different import looks_of, seen_of
from participant.measured import Measured
from participant.site import Site
from participant.task_data import load_for
from participant.text_data import Records, load_records
from privacy.errors import UserError
from privacy.plan import Plan

#: More tokens than any record has.
UNCUT = 1 << 40


def check_data(site: Site, name: str, plan: Plan | None) -> dict[str, int]:
    """Counts of a data set's records: by kind, with a plan for classification by label, with one for regression of
    different texts, with one for text generation of tokens too.

    Raises:
        UserError: a record is wrong (the error names it), the plan is of another data set, or its base model is not
            here.
    """
    data = site.home.settings.datasets[name]
    path = site.home.path(data.path)
    if plan is not None and plan.data.dataset != name:
        raise UserError(f"plan '{plan.name}': expected one of data set '{name}', found '{plan.data.dataset}'")
    records = load_records(path, data) if plan is None else load_for(plan, path, data)
    found = {"records": len(records)}
    if isinstance(records, Measured):
        assert plan is not None
        return found | {"different texts": _different(site, plan, records)}
    if isinstance(records, Records):
        return found | records.kinds() | ({} if plan is None else _tokens(site, plan, records))
    assert plan is not None
    counts = Counter(records.labels)
    return found | {label: counts[i] for i, label in enumerate(plan.data.labels)}


def _base(site: Site, plan: Plan) -> Path:
    base = find_base(site.home, plan.base.name)
    check_base(plan, base)
    return base


def _different(site: Site, plan: Plan, records: Measured) -> int:
    """Different texts as the plan's minimum counts them, or by how they look where the site lacks the base model."""
    if plan.base.name not in site.home.settings.models:
        return len(set(looks_of(records.texts)))
    return len(set(seen_of(plan, _base(site, plan), records)))


def _tokens(site: Site, plan: Plan, records: Records) -> dict[str, int]:
    from participant.loading import load_tokenizer
    from participant.tokens import encode

    if plan.base.name not in site.home.settings.models:
        raise UserError(
            f"expected base model '{plan.base.name}' in participant.toml, found none", hint="name it under [models]"
        )
    base = _base(site, plan)
    assert plan.generation is not None
    whole = encode(load_tokenizer(base), records.records, plan.generation.template, UNCUT)
    most = plan.data.max_length
    return {
        "tokens": sum(min(len(one), most) for one in whole),
        "tokens_that_count": sum(int(one.counted[:most].sum()) for one in whole),
        "longest": max(len(one) for one in whole),
        "cut": sum(len(one) > most for one in whole),
        "without_a_token_that_counts": sum(not bool(one.counted[:most].any()) for one in whole),
    }
