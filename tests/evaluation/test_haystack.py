"""Hiding sentences: exact lengths, at line ends, in order."""

from __future__ import annotations

import pytest

from commvq_core.evaluation.haystack import NOISE, Haystack
from commvq_core.models import LoadedModel


def ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_needles_stand_between_lines_at_their_depths(loaded: LoadedModel) -> None:
    hay = Haystack.of_noise(loaded)
    needles = [ids(loaded, "first\n"), ids(loaded, "second\n"), ids(loaded, "third\n")]
    found = hay.hide(needles, [0, 50, 100], start=0, text=20 * len(hay))
    assert len(found) == 20 * len(hay) + sum(map(len, needles))
    assert loaded.tokenizer.decode(found) == f"first\n{NOISE * 10}second\n{NOISE * 10}third\n"


def test_needles_at_one_place_keep_their_order(loaded: LoadedModel) -> None:
    hay = Haystack.of_noise(loaded)
    needles = [ids(loaded, "first\n"), ids(loaded, "second\n")]
    found = hay.hide(needles, [50, 50.1], start=0, text=2 * len(hay))
    assert loaded.tokenizer.decode(found) == f"{NOISE}first\nsecond\n{NOISE}"


def test_a_text_goes_round(loaded: LoadedModel) -> None:
    hay = Haystack(loaded, ids(loaded, "one two three\n"))
    found = loaded.tokenizer.decode(hay.hide([], [], start=0, text=3 * len(hay)))
    assert found == "one two three\n" * 3
    assert hay.hide([], [], start=len(hay), text=5) == hay.ids[:5]


@pytest.mark.parametrize("sentences", [True, False])
def test_sentences_end_at_full_stops_and_not_inside_names(
    loaded: LoadedModel, sentences: bool
) -> None:
    tokens = ids(loaded, "Here os.path ends. Then another")
    hay = Haystack(loaded, tokens, sentences=sentences)

    def hidden(behind: str) -> str:
        place = len(ids(loaded, behind))
        assert ids(loaded, behind) == tokens[:place]
        depth = 100 * (place + 1) / len(tokens)
        needle = ids(loaded, "<X>")
        return loaded.tokenizer.decode(hay.hide([needle], [depth], start=0, text=len(hay)))

    assert hidden("Here os.path ends.").startswith("Here os.path ends.<X>") == sentences
    assert "os.<X>" not in hidden("Here os.")
