"""Numbers for people have the unit that fits."""

from __future__ import annotations

from megatron_mm.reporting.units import scaled, size, spans


def test_units_fit() -> None:
    assert [size(value) for value in (0, 12, 999.7, 1234, 4.3e11)] == ["0 B", "12 B", "1 kB", "1.23 kB", "430 GB"]
    assert scaled(3.82e13, "FLOP") == "38.2 TFLOP"
    assert spans(36.0, 30.0) == (["36", "30"], "s") and spans(864000.0, 950400.0) == (["10.0", "11.0"], "days")
