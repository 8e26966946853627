"""The model card of a release: from plan, rules and manifest to the README.md beside an adapter.

Nothing is read, written or measured here. Coordinator, sites and auditors each make a release's card from what they
verified themselves, and it comes out in the same bytes: hence nothing in it depends on the machine, the version of
Python or the hour, nor on signatures that arrive after a release (a manifest says which cohorts are certified).

A card is meant to travel farther than a manifest. It tells how many members a release is over, never which.

Base model and labels are words of whoever wrote the plan. They appear in code spans and quoted strings only, and
what could end one of these is escaped: no word becomes Markdown, HTML or YAML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from privacy.aligned import plan_at
from privacy.job import Job
from privacy.outcome import Facts
from privacy.plan import Plan
from privacy.statement import privacy_statement

#: The Hub's word for what a pipeline of transformers does; a regression is its text classification with one output.
PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "generation": "text-generation",
}
#: What the Hub takes for the name of a model. Others are left out of the header, for which it would refuse a card.
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
#: What ends a code span, makes a column of a table, or begins an escape or a tag.
SPECIAL = frozenset("`|\\<>")
#: How the texts of a card read. Raised with every change to them: an auditor compares cards of its own layout only.
LAYOUT = 1
LAST_LINE = re.compile(rb"\nModel card of veilsum, layout ([1-9][0-9]{0,3})\.\n\Z")
#: Ranks up to which vLLM can be told to serve.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

METHODS = {
    "freeze_a": "B is averaged over the sites, A is frozen and public: the mean is exact but for quantisation",
    "both": "A and B are averaged apart, which is not the average of their products",
    "regmean": "B is averaged with each direction weighed by what a site has seen in it",
    "fisher": "each number is averaged with weights from squared gradients",
    "core": "a core between frozen factors of the base model's weights is averaged: exact but for quantisation",
    "dense": "the products of B and A are averaged and cut back to the rank of the adapter",
}
HEADS = {
    "analytic": "the head is a ridge solution from sums of statistics of all records; it is not trained",
    "counted": "each row of the head counts by a site's records of its class",
}
TRAINED = {
    "all": "B, and the head where there is one",
    "both": "A and B, and the head where there is one",
    "head": "the head alone",
    "lora": "B alone, behind a fixed head",
}
#: How a text begins for which a language model of each template is asked to go on.
PROMPTS = {
    "model": '[{"role": "user", "content": "A question"}]',
    "chatml": '"<|im_start|>user\\nA question<|im_end|>\\n<|im_start|>assistant\\n"',
    "none": '"A prompt"',
}


def model_card(job: Job, facts: Facts) -> bytes:
    """README.md of a release.

    Args:
        job: of the plan, at any stage.
        facts: what :func:`privacy.outcome.manifest` says of the release.
    """
    plan = job.plan_file.plan
    parts = [
        _header(plan),
        _about(plan, facts),
        _making(plan, facts),
        _evaluation(plan, facts),
        _loading(plan),
        privacy_statement(plan, job.rules, facts["stage"]),
        _checking(facts),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part).encode() + b"\n"


def foreign_layout(found: bytes) -> int | None:
    """The layout that a card names if it is another than ours, whose texts nobody here can make again."""
    named = LAST_LINE.search(found)
    return int(named[1]) if named is not None and int(named[1]) != LAYOUT else None


def code(text: str) -> str:
    """``text`` that somebody else wrote as a code span of Markdown, in one line and with nothing that ends it."""
    return f"`{''.join(c if _is_plain(c) and c not in SPECIAL else _escaped(c) for c in text)}`"


def quoted(text: str) -> str:
    """``text`` that somebody else wrote as a string in ASCII that YAML and Python read alike."""
    plain = (c if " " <= c <= "~" and c not in '"`\\' else f"\\U{ord(c):08X}" for c in text)
    return f'"{"".join(plain)}"'


def _is_plain(character: str) -> bool:
    """Letters, digits, signs and the space, by the same Unicode in every version of Python."""
    return character == " " or unicodedata.ucd_3_2_0.category(character)[0] in "LNMPS"


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x80 else f"\\U{number:08X}"


def _header(plan: Plan) -> list[str]:
    """The YAML that the Hub reads."""
    lines = ["---"]
    if HUB_NAME.fullmatch(plan.base.name):
        lines += [f"base_model: {quoted(plan.base.name)}", "base_model_relation: adapter"]
    tags = ["lora", "federated-learning", "secure-aggregation", "veilsum"]
    tags += ["differential-privacy"] if plan.privacy is not None else []
    lines += ["library_name: peft", f"pipeline_tag: {PIPELINES[plan.task]}", "tags:"]
    return [*lines, *(f"- {tag}" for tag in tags), "---"]


def _about(plan: Plan, facts: Facts) -> list[str]:
    adapter, data = plan.adapter, plan.data
    lines = [
        f"# {code(plan.name)}, stage {facts['stage']} of {plan.last}",
        "",
        "A LoRA adapter that several organisations fine-tuned together without pooling their records: each worked on",
        "its own, and only the sum of their masked updates was opened.",
        "",
        f"* Task: {plan.task}.",
        f"* Base model: {code(plan.base.name)}, as the federation names it. What was trained on has the SHA-256",
        f"  `{plan.base.digest}` over weights, configuration and tokenizer.",
        f"* Adapter: rank {adapter.rank}, alpha {adapter.alpha:g}, {len(adapter.modules)} modules; digest",
        f"  `{facts['adapter_digest']}`.",
        f"* Texts are cut at {data.max_length} tokens.",
    ]
    if data.labels:
        lines.append(f"* Labels, in the order of the outputs: {', '.join(map(code, data.labels))}.")
    if data.target is not None:
        low, high = data.target
        lines.append(f"* Target: a number from {low!r} to {high!r}; the model says it as one from -1 to 1.")
    return lines


def _making(plan: Plan, facts: Facts) -> list[str]:
    """Which rounds it comes from, and what was made of their sums."""
    stage, judged = facts["stage"], plan.judges(facts["stage"])
    what = "An evaluation: nothing is trained in it" if judged else f"Stage {stage} of {plan.stages} of training"
    lines = ["## How it was made", "", f"{what}. Plan `{facts['plan_digest']}`.", ""]
    lines += ["| round | members in the sum | their weight |", "|---:|---:|---:|"]
    lines += [f"| {c['round']} | {len(c['survivors'])} | {c['total_weight']} |" for c in facts["cohorts"]]
    lines += ["", f"* {_weight(plan, judged)}"]
    if judged:
        return lines
    seen = plan_at(plan, stage)
    if seen.aggregation.head != "analytic":
        lines.append(f"* Trained: {TRAINED[seen.adapter.train]}.")
        lines.append(f"* Method `{seen.aggregation.method}`: {METHODS[seen.aggregation.method]}.")
        lines.append(f"* The mean is applied at a rate of {seen.aggregation.server_lr:g}.")
    if seen.aggregation.head != "trained":
        lines.append(f"* Head `{seen.aggregation.head}`: {HEADS[seen.aggregation.head]}.")
    lines += _measured(facts)
    if plan.privacy is None and "training_loss" in facts:
        lines.append(f"* Mean loss of training: {facts['training_loss']:.6g}.")
    return lines


def _weight(plan: Plan, judged: bool) -> str:
    if judged:
        return "Weight is held-out answers: records, or tokens of a language model."
    if plan.aggregation.weights == "uniform":
        return "Every member has the same weight."
    if plan.privacy is not None:
        return "Every member's weight is the plan's nominal size, whatever its number of records."
    return "A member's weight is its number of records."


def _measured(facts: Facts) -> Iterator[str]:
    """What a method says of its own error, or of what it added."""
    for name, what in (("probe", "Error of averaging apart"), ("truncation", "Error of cutting back to the rank")):
        if name in facts:
            error, floor = facts[name]["relative_error"], facts[name]["of_rounding"]
            yield f"* {what}: {error:.6g} of the update's length, {floor:.6g} of it by rounding alone."
    if "ridge" in facts:
        yield f"* Ridge that was used: {facts['ridge']:.6g}."


def _evaluation(plan: Plan, facts: Facts) -> list[str]:
    if "evaluation" not in facts:
        return []
    right = "right"
    if plan.evaluation is not None and plan.evaluation.tolerance is not None:
        right = f"off by at most {plan.evaluation.tolerance:g}"
    lines = ["## Evaluation", "", "On what all sites together kept out of training; each site counted for itself.", ""]
    lines += [f"| adapter | answers | {right} | share | loss |", "|---|---:|---:|---:|---:|"]
    for one in facts["evaluation"]["candidates"]:
        name = one["candidate"] + (" (this one)" if one["candidate"] == facts["evaluation"]["elected"] else "")
        lines.append(f"| {name} | {one['records']} | {one['correct']} | {one['accuracy']:.4f} | {one['loss']:.4f} |")
    return [*lines, "", "This adapter was elected by these very answers, which flatters it a little."]


def _loading(plan: Plan) -> list[str]:
    """Python that runs where the base model and this directory, as ``adapter``, are at hand."""
    kind = "CausalLM" if plan.task == "generation" else "SequenceClassification"
    base, asked = quoted(plan.base.name), f"truncation=True, max_length={plan.data.max_length}"
    lines = ["## How to load it", ""]
    lines += ["`adapter` is the directory of this file. The first three lines are PEFT's, the rest is a pipeline.", ""]
    lines += [
        "```python",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        "",
    ]
    lines += [f"base = AutoModelFor{kind}.from_pretrained({base}{_outputs(plan)})"]
    lines += ['model = PeftModel.from_pretrained(base, "adapter")', ""]
    lines += ["from transformers import pipeline", "", f"tokenizer = AutoTokenizer.from_pretrained({base})"]
    lines += [f'ask = pipeline("{PIPELINES[plan.task]}", model=model, tokenizer=tokenizer)']
    if plan.generation is not None:
        lines.append(f"answer = ask({PROMPTS[plan.generation.template]}, max_new_tokens=40)")
    elif plan.data.target is not None:
        low, high = plan.data.target
        lines.append(f'said = ask("A text", function_to_apply="none", {asked})[0]["score"]')
        lines.append(f"answer = {low!r} + (said + 1) * ({high!r} - {low!r}) / 2")
    else:
        lines.append(f'answer = ask("A text", {asked})')
    return [*lines, "```", "", *_serving(plan)]


def _outputs(plan: Plan) -> str:
    """Arguments that give a classifier its head."""
    if plan.task == "generation":
        return ""
    names = ", ".join(f"{number}: {quoted(label)}" for number, label in enumerate(plan.data.labels))
    return f", num_labels={plan.outputs}" + (f", id2label={{{names}}}" if names else "")


def _serving(plan: Plan) -> list[str]:
    if plan.task != "generation":
        return ["An adapter with a head is for PEFT and transformers; vLLM serves adapters of language models only."]
    rank = next((rank for rank in VLLM_RANKS if rank >= plan.adapter.rank), None)
    if rank is None:
        return [f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}; this one is larger."]
    asked = f"--enable-lora --max-lora-rank {rank} --lora-modules {plan.name}=adapter"
    return [
        "The directory has the layout that vLLM reads, if it serves the base model and all of its adapted modules:",
        f"`vllm serve BASE_MODEL {asked}`.",
    ]


def _checking(facts: Facts) -> list[str]:
    return [
        "## How to check it",
        "",
        f"`veilsum-audit transcript` on the release (`{facts['plan']}/stage-{facts['stage']}`: this directory, the",
        "manifest and the evidence) computes the adapter and this card from the totals of its rounds. The manifest",
        "says which rounds are certified, that is, have sums that enough members recomputed, and who took part.",
        "",
        f"Model card of veilsum, layout {LAYOUT}.",
    ]
