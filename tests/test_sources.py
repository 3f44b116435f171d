"""Captions as any source reads them."""

import pytest

from rise_jax.data.scenes import ScenesSource
from rise_jax.data.sources import Text, check_clips, identity_of, text_of, unique_texts


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"prompt": "p"}, Text("p", None)),
        ({"caption": "c"}, Text("c", None)),
        ({"prompt": "p", "caption": "c"}, Text("p", "c")),
        ({"prompt": "p", "rephrased": "r"}, Text("p", "r")),
        ({"caption": "c", "rephrased": "r"}, Text("c", "r")),
        ({"prompt": "p", "caption": "c", "rephrased": "r"}, Text("p", "r")),
        ({"prompt": " ", "caption": " c ", "rephrased": " "}, Text("c", None)),
        ({"prompt": " ", "rephrased": "r"}, None),
        ({}, None),
    ],
)
def test_which_column_is_the_prompt_and_which_the_rephrasing(cells, text):
    assert text_of(cells) == text


def test_unique_texts_keep_their_first_place():
    texts, index = unique_texts([Text("b", None), Text("a", "x"), Text("b", None), Text("b", "x")])
    assert texts == [Text("b", None), Text("a", "x"), Text("b", "x")]
    assert index.tolist() == [0, 1, 0, 2]


def test_a_run_does_not_go_on_with_other_clips_or_texts():
    scenes = lambda **changes: ScenesSource(**dict(num_texts=3, frames=1, height=16, width=16, length=6) | changes)
    then = identity_of(scenes())
    check_clips("run", then, scenes())
    for changes, told in ((dict(length=7), "6 clips then, 7 now, .* the same"), (dict(seed=1), "6 now, .* others")):
        with pytest.raises(ValueError, match=f"run began with other data: .*{told}. Put the captions back"):
            check_clips("run", then, scenes(**changes))
    other = scenes()
    other.texts[1] = other.texts[1]._replace(rephrased="something else")
    with pytest.raises(ValueError, match="their texts are others"):
        check_clips("run", then, other)
