"""Captions as any source reads them."""

import pytest

from rise_jax.data.sources import Text, text_of, unique_texts


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
