"""Kubernetes quantities ("500m", "64Mi", "1e3") to plain integers and back.

Source: k8s.io/apimachinery/pkg/api/resource/quantity.go (the grammar in the type's comment). As there,
a fraction of the smallest unit rounds up.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_GRAMMAR = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    r"(?:(?P<binary>[KMGTPE]i)|(?P<decimal>[numkMGTPE])|[eE](?P<exponent>[+-]?[0-9]{1,2}))?",
    re.ASCII,
)
_MAX_LENGTH = 64
_BINARY = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "P": Decimal(10) ** 15,
    "E": Decimal(10) ** 18,
}


def parse_quantity(value: str | int) -> Decimal:
    """The exact value of a quantity. Raises ValueError where `value` is none."""
    text = str(value)
    match = _GRAMMAR.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        raise ValueError(f"must be a quantity such as 500m, 2 or 64Mi, not {text[:_MAX_LENGTH]!r}")
    number = Decimal(match["number"])
    if match["binary"]:
        return number * _BINARY[match["binary"]]
    if match["decimal"]:
        return number * _DECIMAL[match["decimal"]]
    return number.scaleb(int(match["exponent"] or 0))


def parse_cpu_millis(value: str | int) -> int:
    """CPU as thousandths of a core: "500m" -> 500, 2 -> 2000. Raises ValueError."""
    return _whole(parse_quantity(value) * 1000, value)


def parse_bytes(value: str | int) -> int:
    """Memory or storage as bytes: "64Mi" -> 67108864. Raises ValueError."""
    return _whole(parse_quantity(value), value)


def format_cpu_millis(millis: int) -> str:
    """The shortest CPU quantity: 500 -> "500m", 2000 -> "2"."""
    return str(millis // 1000) if millis % 1000 == 0 else f"{millis}m"


def format_bytes(count: int) -> str:
    """The shortest exact binary quantity: 67108864 -> "64Mi", 1500 -> "1500"."""
    for suffix, factor in reversed(_BINARY.items()):
        if count and count % int(factor) == 0:
            return f"{count // int(factor)}{suffix}"
    return str(count)


def _whole(number: Decimal, value: str | int) -> int:
    if number < 0:
        raise ValueError(f"must not be negative, not {value!r}")
    return int(number.to_integral_value(rounding=ROUND_CEILING))
