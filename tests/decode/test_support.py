"""Every family of the installed transformers: it drafts losslessly, and sparsely, or is refused with a reason."""

import pytest
import support


@pytest.fixture(scope="module")
def rows():
    return support.sweep(support.all_families())


@pytest.mark.slow
def test_a_family_drafts_without_loss_or_is_refused(rows):
    failed = [
        (row.family, name, draft) for row in rows for name, draft in row.drafts.items() if draft.verdict == "fails"
    ]
    assert not failed
    refused = [draft for row in rows for draft in row.drafts.values() if draft.verdict == "refused"]
    assert all(len(support.short(draft.reason).split()) > 3 for draft in refused)


@pytest.mark.slow
def test_drafts_are_as_dense_as_they_are_asked_to_be(rows):
    assert not [
        (row.family, name, draft.density)
        for row in rows
        for name, draft in row.drafts.items()
        if draft.density is not None and abs(draft.density / support.DRAFTS[name]["density"] - 1) > 0.05
    ]


@pytest.mark.slow
def test_most_families_are_supported(rows):
    working = [row for row in rows if any(draft.verdict == "works" for draft in row.drafts.values())]
    assert len([row for row in working if row.mapping == "causal"]) >= 150
    assert len(support.page_of(rows).splitlines()) > len(working)


def test_an_error_and_a_process_that_ends_are_rows(monkeypatch):
    def examine(mapping, family):
        if family == "ends":
            raise SystemExit
        return support.Row(mapping, family, reason=support.told(KeyError(family)))

    monkeypatch.setattr(support, "examine", examine)
    told = [row.reason for row in support.sweep([("causal", "ends"), ("causal", "fails")])]
    assert told == ["its process ended", "KeyError: 'fails'"]


@pytest.mark.parametrize(
    "reason, expected",
    [
        ("ValueError: X keeps no KV-cache, so that it reads: use another", "X keeps no KV-cache, so that it reads"),
        ("ValueError: a | b (the first is c), which hf_sirius cannot", "a / b"),
    ],
)  # fmt: skip
def test_reasons_are_short(reason, expected):
    assert support.short(reason) == expected
