"""What is inside: a line per system over the layers, and numbers of whole systems."""

from __future__ import annotations

import re

from example import audit

from delible.audit.result import AuditResult, Curve, Leak
from delible.report.page import ReportData, render


def page(found: AuditResult) -> str:
    return render(ReportData(title="T", audit=found))


def section(text: str) -> str:
    found = re.search(r'<section id="inside".*?</section>', text, re.DOTALL)
    return found.group() if found else ""


def inside() -> AuditResult:
    found = audit()
    found.leaks.append(
        Leak(
            attack="cka", title="Likeness of hidden states (CKA)", family="inside", knowledge={},
            erased={}, weighs=False,
            numbers={"like_the_reference": {"original": 0.0, "unlearned": 0.25, "reference": 1.0},
                     "best_layer": {"original": 2.0}},
        )
    )  # fmt: skip
    found.leaks.append(
        Leak(attack="patching", title="Activation patching (UDS)", knowledge={}, erased={})
    )
    found.curves.append(
        Curve(
            attack="patching", metric="inside", axis="layer", steps=[1, 2, 3, 4],
            values={
                "original": [1.0, 1.0, 1.0, 1.0],
                "unlearned": [1.0, 0.5, None, 0.25],
                "reference": [0.0, 0.0, 0.0, 0.0],
            },
        )
    )  # fmt: skip
    return found


def test_each_system_has_a_line_over_the_layers() -> None:
    text = section(page(inside()))
    assert text.count("<figure>") == 1
    assert "<strong>Activation patching (UDS)</strong>" in text
    (svg,) = re.findall(r"<svg class=\"chart\".*?</svg>", text, re.DOTALL)
    points = re.findall(r"<title>(unlearned, [^<]*)</title>", svg)
    assert points == ["unlearned, 1: 1.000", "unlearned, 2: 0.500", "unlearned, 4: 0.250"]
    assert len(re.findall(r"<title>original, ", svg)) == 4
    assert len(re.findall(r"<title>reference, ", svg)) == 4
    assert ">Layer<" in svg
    assert ">Knowledge<" in svg
    assert 'id="layers-0-title"' in svg


def test_layers_are_no_steps_of_an_attack() -> None:
    text = page(inside())
    relearning = re.search(r'<section id="relearning".*?</section>', text, re.DOTALL)
    assert relearning is not None
    assert "Activation patching" not in relearning.group()
    assert ">Layer<" not in relearning.group()
    assert "LoRA, unrelated rows" not in section(text)
    only = inside()
    only.curves = [curve for curve in only.curves if curve.axis == "layer"]
    assert 'id="relearning"' not in page(only)
    assert '<a href="#inside">' in page(only)


def test_numbers_of_whole_systems_are_in_a_table() -> None:
    text = section(page(inside()))
    rows = re.findall(r"<tr><td>(.*?)</td><th[^>]*>(.*?)</th>(.*?)</tr>", text, re.DOTALL)
    told = {name: re.sub(r"<[^>]*>", " ", cells).split() for _, name, cells in rows}
    assert [attack for attack, _, _ in rows] == ["Likeness of hidden states (CKA)"] * 2
    assert told["Like the reference"][:3] == ["0", "0.250", "1.000"]
    assert told["Best layer"][0] == "2.000"
    assert "gave no such number" in text


def test_without_a_look_inside_there_is_no_section() -> None:
    text = page(audit())
    assert section(text) == ""
    assert "#inside" not in text
