"""Tables of the keys of a TOML file, from the models that read it: type and default from the model, what a key says
from the ``#:`` comment above it in the source, and where a table begins, from what its own model is.
"""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from pydantic import TypeAdapter

import coordinator.config
from participant import config
from privacy import aggregation, guarantee, plan, roster, sections
from privacy.guarantee import Number
from privacy.settings import HexDigest, Name, Section
from privacy.web.settings import Web

HEAD = ("| key | what may stand there | default | what it says |", "|---|---|---|---|")
#: Name of a table on the pages -> the model with its keys.
MODELS: dict[str, type[Section]] = {
    "site": config.Settings,
    "dataset": config.DataSet,
    "budget": config.Budget,
    "site_policy": config.SitePolicy,
    "admits": config.Admits,
    "coordinator": coordinator.config.Settings,
    "web": Web,
    "plan": plan.Plan,
    "base": sections.Base,
    "adapter": sections.Adapter,
    "data": sections.Data,
    "training": sections.Training,
    "generation": sections.Generation,
    "privacy": guarantee.Privacy,
    "aggregation": aggregation.Aggregation,
    "analytic": aggregation.Analytic,
    "counted": aggregation.Counted,
    "regmean": aggregation.Regmean,
    "fisher": aggregation.Fisher,
    "core": aggregation.Core,
    "evaluation": aggregation.Evaluation,
    "round": sections.Round,
    "deadlines": sections.Deadlines,
    "roster": roster.Roster,
    "policy": roster.Policy,
    "member": roster.Member,
}
#: Where there is more about a key.
MORE = {
    ("site", "device"): "how-to/gpu.md#which-device",
    ("site", "max_rank"): "aggregation.md#dense",
    ("site", "max_upload_rate"): "#a-slow-line",
    ("site", "metrics_listen"): "metrics.md",
    ("site", "models"): "how-to/gpu.md#a-base-model-in-4-bits",
    ("site", "web"): "#web",
    ("dataset", "target"): "regression.md",
    ("dataset", "messages"): "text.md",
    ("site_policy", "min_class_count"): "analytic.md",
    ("site_policy", "min_texts"): "aggregation.md#regmean",
    ("admits", "max_epsilon"): "ledger.md",
    ("coordinator", "join_listen"): "joining.md",
    ("coordinator", "metrics_listen"): "metrics.md",
    ("coordinator", "web"): "#web",
    ("plan", "stages"): "stages.md",
    ("data", "target"): "regression.md",
    ("generation", "template"): "text.md",
    ("plan", "privacy"): "privacy.md",
    ("aggregation", "method"): "aggregation.md",
    ("aggregation", "head"): "analytic.md",
    ("plan", "evaluation"): "evaluation.md",
    ("round", "audit"): "protocol.md",
}
#: What a text with a pattern is.
PATTERNS = {
    TypeAdapter(form).json_schema()["pattern"]: words
    for form, words in ((Number, "decimal number in quotes"), (HexDigest, "64 hex digits"), (Name, "name"))
}


def table(name: str) -> str:
    """All keys of one model, in the order of its source."""
    model = MODELS[name]
    schema, said = model.model_json_schema(), comments(model)
    required = schema.get("required", ())
    rows = []
    for key, found in schema["properties"].items():
        more = f" ([more]({MORE[name, key]}))" if (name, key) in MORE else ""
        begins = "required" if key in required else default(found)
        words = " ".join(filter(None, (about(found, schema), said.get(key))))
        rows.append(f"| `{key}` | {allowed(found)} | {begins} | {words}{more} |")
    return "\n".join([*HEAD, *rows])


def comments(model: type[Section]) -> dict[str, str]:
    """Key -> the ``#:`` comment above it, as Markdown."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(model).splitlines():
        if comment := re.match(r"    #: ?(.*)", line):
            lines.append(comment[1])
            continue
        if lines and (key := re.match(r"    (\w+):", line)):
            found[key[1]] = markdown(" ".join(lines))
        lines = []
    return found


def about(found: dict[str, Any], schema: dict[str, Any]) -> str:
    """What the model of a table says of itself; empty for a key that holds none."""
    inner = next((one for one in found.get("anyOf", [found]) if "$ref" in one), None)
    if inner is None:
        return ""
    described: str = schema["$defs"][inner["$ref"].removeprefix("#/$defs/")]["description"]
    return markdown(" ".join(described.partition("\n\n")[0].split()))


def markdown(comment: str) -> str:
    """A comment or a docstring within a cell of a table."""
    return comment.replace("``", "`").replace("|", r"\|")


def default(found: dict[str, Any]) -> str:
    """What holds where the key is missing, as TOML has it."""
    value = found.get("default")
    if value is None or value in ((), [], {}) or isinstance(value, dict):
        return "none"
    return f"`{json.dumps(value)}`"


def allowed(found: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "anyOf" in found:  # or nothing, which the default says
        return allowed(next(one for one in found["anyOf"] if one.get("type") != "null"))
    if "enum" in found:
        return ", ".join(f"`{json.dumps(one)}`" for one in found["enum"])
    if "const" in found:
        return f"`{json.dumps(found['const'])}`"
    if "$ref" in found:
        return "table, below"
    match found["type"]:
        case "integer" | "number":
            return numbers(found)
        case "boolean":
            return "`true`, `false`"
        case "array":
            return items(found)
        case "object":
            inner = next(iter(found.get("patternProperties", {}).values()), None) or found["additionalProperties"]
            return "tables by name" if "$ref" in inner else f"table: name = {allowed(inner)}"
    return PATTERNS.get(found.get("pattern", ""), "text")


def items(found: dict[str, Any]) -> str:
    """A list: of how many, and of what."""
    if "prefixItems" in found:
        return f"[{', '.join(allowed(one) for one in found['prefixItems'])}]"
    inner = allowed(found["items"])
    return f"list of {'tables' if '$ref' in found['items'] else inner}"


def numbers(found: dict[str, Any]) -> str:
    """A number with its bounds."""
    least, most = found.get("minimum"), found.get("maximum")
    above = found.get("exclusiveMinimum")
    below = found.get("exclusiveMaximum")
    words = [
        f"{bound} {value:,}" if isinstance(value, int) else f"{bound} {value:g}"
        for bound, value in (("from", least), ("above", above), ("to", most), ("below", below))
        if value is not None
    ]
    return " ".join([found["type"], *words])
