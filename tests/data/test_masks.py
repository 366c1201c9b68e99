import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import IGNORE
from limbeck.data.masks import shift, supervise

WEIGHT = st.sampled_from([0.0, 0.5, 1.0, 2.0])


@st.composite
def texts(draw):
    """Tokens that cut a text into pieces, and spans of it that do not touch each other's tokens."""
    cuts = [0, *np.cumsum(draw(st.lists(st.integers(1, 4), min_size=1, max_size=20))).tolist()]
    places = np.array([cuts[:-1], cuts[1:]], dtype=np.int64).T
    edges = sorted(draw(st.sets(st.sampled_from(range(len(cuts))), max_size=6)))
    pairs = zip(edges[0::2], edges[1::2], strict=False)
    return places, [(cuts[a], cuts[b], draw(WEIGHT)) for a, b in pairs]


@given(texts(), st.booleans(), WEIGHT)
def test_a_token_counts_as_its_span_does_and_others_as_the_prompt(text, everything, weight):
    places, spans = text
    supervised, weights = supervise(places, spans, everything, weight)
    for i, (start, end) in enumerate(places):
        own = [of_span for first, last, of_span in spans if start >= first and end <= last]
        expected = own[0] if own else weight * everything
        assert supervised[i] == (expected > 0)
        if supervised[i]:
            assert expected == (1 if weights is None else weights[i])
    assert (weights is None) == all(w == 1 for w in (places[:0, 0] if weights is None else weights[supervised]))


@given(st.integers(1, 8), st.integers(0, 4), st.randoms(use_true_random=False))
def test_labels_and_weights_move_together_by_one(length, cut_off, random):
    tokens = np.array([random.randrange(100) for _ in range(length)], dtype=np.int32)
    supervised = np.array([random.random() < 0.5 for _ in range(length + cut_off)])
    weights = np.array([random.random() for _ in supervised], dtype=np.float32)
    labels, shifted = shift(tokens, supervised, weights)
    assert labels[-1] == IGNORE
    assert shifted[-1] == 0
    for t in range(length - 1):
        assert labels[t] == (tokens[t + 1] if supervised[t + 1] else IGNORE)
        assert shifted[t] == (weights[t + 1] if supervised[t + 1] else 0)
    assert shift(tokens, supervised, None)[1] is None


def test_a_token_across_the_edge_belongs_to_the_answer_and_blanks_left_out_to_their_token():
    places = np.array([[0, 2], [2, 5], [6, 8]])  # the blank at 5 is not in any place
    assert supervise(places, [(4, 6, 1.0)])[0].tolist() == [False, True, True]
    assert supervise(places, [(4, 5, 0.0)], everything=True)[0].tolist() == [True, False, True]
