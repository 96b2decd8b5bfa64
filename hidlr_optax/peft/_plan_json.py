"""Plans as JSON: every field by name, every number exact, and junk refused by name."""

import json
from collections.abc import Callable
from typing import Any

from hidlr_optax.influence._report import GroupInfluence, Influence

_VERSION = 1

_MOST = float("inf")  # 1e400 is read as that

_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_MOST < value < _MOST


def _is_size(value: Any) -> bool:
    return _is_count(value) and value >= 1


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_sizes(value: Any) -> bool:
    return _is_object(value) and all(map(_is_count, value.values()))


def _is_rules(value: Any) -> bool:
    pairs = isinstance(value, list) and all(_is_labels(rule) and len(rule) == 2 for rule in value)
    return value == "role" or pairs


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


_PLAN = {
    "trainable": _is_labels,
    "frozen": _is_labels,
    "psi": _or_none(_is_number),
    "budget": _or_none(_is_count),
    "influence": _or_none(_is_object),
    "sizes": _or_none(_is_sizes),
    "steps": _or_none(_is_count),
    "rules": _or_none(_is_rules),
    "default": _or_none(_is_text),
}
_INFLUENCE = {
    "groups": _is_object,
    "steps": _is_count,
    "joint": _is_object,
    "loss": _or_none(_is_number),
}
_GROUP = {
    "size": _is_size,
    **dict.fromkeys(["refreshes", "negative", "unresolved"], _is_count),
    **dict.fromkeys(["total", "total_error", "marginal", "marginal_error"], _or_none(_is_number)),
}


def _checked(fields: Any, checks: dict[str, _Check], what: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise ValueError(f"{what} has to be a JSON object, got {fields!r:.80}")
    if set(fields) != set(checks):
        raise ValueError(f"{what} has to have the fields {sorted(checks)}, got {sorted(fields)}")
    for name, check in checks.items():
        if not check(fields[name]):
            raise ValueError(f"{name!r} of {what} cannot be {fields[name]!r:.80}")
    return fields


def _influence(fields: Any) -> Influence:
    if isinstance(fields, dict):
        fields = {"joint": {}, "loss": None} | fields  # plans of before know neither
    found = _checked(fields, _INFLUENCE, "an influence")

    def groups(field: str) -> dict[str, GroupInfluence]:
        return {
            label: GroupInfluence(**_checked(group, _GROUP, f"the group {label!r}"))
            for label, group in found[field].items()
        }

    return Influence(groups("groups"), found["steps"], groups("joint"), found["loss"])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a finite number")


def write(fields: dict[str, Any]) -> str:
    """The fields of a plan, as plain Python values or NumPy scalars, with the version."""
    return json.dumps(
        {"version": _VERSION} | fields,
        indent=1,
        allow_nan=False,
        default=lambda scalar: scalar.item(),
    )


def read(text: str) -> dict[str, Any]:
    """The fields that `write` was given; a ValueError where they are none of a plan."""
    try:
        fields = json.loads(text, parse_constant=_refuse)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a plan has to be JSON: {error}") from error
    version = fields.pop("version", None) if isinstance(fields, dict) else _VERSION
    if version != _VERSION:
        raise ValueError(f"a plan has to be of version {_VERSION}, got {version!r}")
    fields = _checked(fields, _PLAN, "a plan")
    if fields["influence"] is not None:
        fields["influence"] = _influence(fields["influence"])
    return fields
