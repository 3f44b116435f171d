"""Datasets prepared by tfds, made here by real builders, read without tensorflow."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rise_jax.data.sources import BadClipError, Text
from rise_jax.data.tfds_source import TfdsSource
from rise_jax.video import write_png, write_video


def grays(count, height=8, width=12):
    """Frame n has level 10 n."""
    return np.broadcast_to((10 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def numbers(clip):
    return [round(float(frame.mean()) / 10) for frame in clip]


VIDEO = tfds.features.Tensor(shape=(None, 8, 12, 3), dtype=np.uint8)
IMAGE = tfds.features.Tensor(shape=(8, 12, 3), dtype=np.uint8)
BYTES = tfds.features.Tensor(shape=(), dtype=np.object_)
TEXT = tfds.features.Text()


@pytest.fixture
def prepare(tmp_path):
    """prepare(features, {split: examples}) writes the dataset `clips` below tmp_path and forgets its builder."""

    def prepare(features, splits):
        class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples):
                yield from enumerate(examples)

        Clips(data_dir=tmp_path, file_format="array_record").download_and_prepare()

    return prepare


def source(tmp_path, name="clips", **changes):
    return TfdsSource(
        name, path=tmp_path and str(tmp_path), **{"frames": 3, "height": 8, "width": 8, "fps": 10} | changes
    )


def by_prompt(made):
    """Items by prompt: tfds shuffles when it writes."""
    return {made.texts[made._text[item]].prompt: item for item in range(len(made))}


def test_video_tensors_and_their_texts(prepare, tmp_path):
    long = {4: "long 4", 5: "", 6: "long 6"}
    train = [{"video": grays(n), "prompt": f"perro {n} ñ", "rephrased": long[n]} for n in long]
    held_out = [{"video": grays(4), "prompt": "unseen", "rephrased": ""}]
    prepare({"video": VIDEO, "prompt": TEXT, "rephrased": TEXT}, {"train": train, "validation": held_out})
    made = pickle.loads(pickle.dumps(source(tmp_path)))  # as a worker process gets it
    assert len(made) == 3
    assert set(made.texts) == {Text("perro 4 ñ", "long 4"), Text("perro 5 ñ", None), Text("perro 6 ñ", "long 6")}
    item = by_prompt(made)["perro 6 ñ"]
    assert numbers(made.load(item, None).video) == [1, 2, 3]
    starts = {numbers(made.load(item, np.random.default_rng(seed)).video)[0] for seed in range(40)}
    assert starts == {0, 1, 2, 3}
    assert made.load(item, None).video.shape == made.shape == (3, 8, 8, 3)
    assert made.name(item) == f"tfds:clips/train[{item}]"
    assert source(tmp_path, split="heldout").texts == [Text("unseen", None)]
    assert source(tmp_path, split="heldout").name(0) == "tfds:clips/validation[0]"


def test_the_rate_of_a_tensor_is_its_fps_feature(prepare, tmp_path):
    features = {"video": VIDEO, "caption": TEXT, "fps": tfds.features.Scalar(dtype=np.float32)}
    prepare(features, {"train": [{"video": grays(9), "caption": "c", "fps": 20.0}]})
    made = source(tmp_path)
    assert numbers(made.load(0, None).video) == [2, 4, 6]
    assert numbers(source(tmp_path, frames=7).load(0, None).video) == [0, 2, 4, 6, 8, 8, 8]
    assert made.texts == [Text("c", None)]


def test_encoded_bytes(prepare, tmp_path):
    write_video(tmp_path / "a.mp4", np.ascontiguousarray(grays(12, 32, 32)), fps=10)
    examples = [{"video": (tmp_path / "a.mp4").read_bytes(), "text": "good"}, {"video": b"no media", "text": "bad"}]
    prepare({"video": BYTES, "text": TEXT}, {"train": examples})
    made = source(tmp_path)
    items = by_prompt(made)
    assert numbers(made.load(items["good"], None).video) == [4, 5, 6]
    with pytest.raises(BadClipError, match=r"tfds:clips/train\[\d\]: .*Invalid data"):
        made.load(items["bad"], None)


def test_images(prepare, tmp_path):
    prepare({"image": IMAGE, "prompt": TEXT}, {"train": [{"image": grays(5)[4], "prompt": "p"}]})
    assert numbers(source(tmp_path, frames=1).load(0, np.random.default_rng(0)).video) == [4]
    with pytest.raises(ValueError, match=r"clips/train holds still images, which cannot fill 3 frames"):
        source(tmp_path)


def test_encoded_images(prepare, tmp_path):
    write_png(tmp_path / "a.png", grays(5)[4])
    prepare({"image": BYTES, "prompt": TEXT}, {"train": [{"image": (tmp_path / "a.png").read_bytes(), "prompt": "p"}]})
    assert numbers(source(tmp_path, frames=1).load(0, None).video) == [4]


def test_the_test_split_is_held_out_where_there_is_no_validation(prepare, tmp_path):
    example = {"image": grays(1)[0], "prompt": "p"}
    prepare({"image": IMAGE, "prompt": TEXT}, {"train": [example], "test": [example] * 2})
    assert len(source(tmp_path, frames=1, split="heldout")) == 2


def test_a_split_that_is_not_there(prepare, tmp_path):
    prepare({"image": IMAGE, "prompt": TEXT}, {"train": [{"image": grays(1)[0], "prompt": "p"}]})
    with pytest.raises(ValueError, match="no split validation or test for 'heldout'; its splits: train"):
        source(tmp_path, frames=1, split="heldout")
    with pytest.raises(ValueError, match="'val' is unknown; tfds has train and heldout"):
        source(tmp_path, split="val")


def test_an_unknown_dataset_names_the_nearest(tmp_path):
    (tmp_path / "my_clips").mkdir()
    for name, nearest in (("mnits", "mnist"), ("my_clip", "my_clips")):
        with pytest.raises(ValueError, match=rf"tfds:{name} is not in data.path=.*\(nearest: {nearest}\)"):
            source(tmp_path, name=name)


def test_a_dataset_that_is_not_prepared_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="(?s)tfds:mnist .* cannot be read.*download_and_prepare"):
        source(tmp_path, name="mnist")
    with pytest.raises(ValueError, match="tfds:mnist is not prepared in data.path=''"):
        source(None, name="mnist")


@pytest.mark.parametrize(
    ("features", "example", "match"),
    [
        ({"clip": IMAGE, "prompt": TEXT}, {"clip": grays(1)[0], "prompt": "p"}, "or image; its features: clip, prompt"),
        ({"video": IMAGE, "prompt": TEXT}, {"video": grays(1)[0], "prompt": "p"}, r"video is uint8 \[8, 12, 3\]"),
        ({"video": VIDEO, "title": TEXT}, {"video": grays(4), "title": "p"}, r"train\[0\] has no text in prompt"),
        ({"video": VIDEO, "prompt": TEXT}, {"video": grays(4), "prompt": " "}, r"train\[0\] has no text in prompt"),
    ],
)
def test_features_of_another_kind(prepare, tmp_path, features, example, match):
    prepare(features, {"train": [example]})
    with pytest.raises(ValueError, match=match):
        source(tmp_path)


LABEL = tfds.features.ClassLabel(names=["cat", "dog"])
NUMBER, FLAG = tfds.features.Scalar(dtype=np.int64), tfds.features.Scalar(dtype=np.bool_)
LIST, NUMBERS = tfds.features.Sequence(TEXT), tfds.features.Tensor(shape=(1,), dtype=np.float32)


@pytest.mark.parametrize(
    ("features", "values", "told"),
    [
        ({"prompt": LIST}, {"prompt": ["a", "b"]}, r"prompt is Sequence\(Text.*; it must be Text"),
        ({"caption": LABEL}, {"caption": "dog"}, r"caption is ClassLabel\(.*; it must be Text"),
        ({"text": NUMBER}, {"text": 3}, r"text is Scalar\(shape=\(\), dtype=int64\); it must be Text"),
        ({"prompt": TEXT, "rephrased": LABEL}, {"prompt": "p", "rephrased": 0}, r"rephrased is ClassLabel"),
        ({"prompt": TEXT, "fps": TEXT}, {"prompt": "p", "fps": "8"}, r"fps is Text\(.*; it must be a Scalar of an "),
        ({"prompt": TEXT, "fps": NUMBERS}, {"prompt": "p", "fps": [8]}, "fps is T"),
        ({"prompt": TEXT, "fps": FLAG}, {"prompt": "p", "fps": True}, "fps is Scalar"),
    ],
)
def test_texts_and_rates_of_another_kind_are_named(prepare, tmp_path, features, values, told):
    prepare({"video": VIDEO} | features, {"train": [{"video": grays(4)} | values]})
    with pytest.raises(ValueError, match=f"tfds:clips/train: the feature {told}"):
        source(tmp_path)


def test_what_an_example_leaves_out_is_absent(prepare, tmp_path):
    text, number = tfds.features.Text(optional=True), tfds.features.Scalar(dtype=np.float32, optional=True)
    examples = [{"rephrased": None, "text": "short", "fps": None}, {"rephrased": "long", "text": "quick", "fps": 20.0}]
    features = {"video": VIDEO, "prompt": text, "rephrased": text, "text": text, "fps": number}
    prepare(features, {"train": [{"video": grays(9), "prompt": None} | example for example in examples]})
    made = source(tmp_path)
    assert set(made.texts) == {Text("short", None), Text("quick", "long")}
    items = by_prompt(made)
    assert numbers(made.load(items["short"], None).video) == [3, 4, 5]
    assert numbers(made.load(items["quick"], None).video) == [2, 4, 6]


@pytest.mark.parametrize("fps", [0.0, -8.0, np.nan, np.inf])
def test_a_rate_that_is_none_is_a_bad_clip(prepare, tmp_path, fps):
    features = {"video": VIDEO, "prompt": TEXT, "fps": tfds.features.Scalar(dtype=np.float32)}
    prepare(features, {"train": [{"video": grays(4), "prompt": "p", "fps": fps}]})
    with pytest.raises(BadClipError, match=rf"tfds:clips/train\[0\]: its fps is {fps:g}; it must be a number above 0"):
        source(tmp_path).load(0, None)


@pytest.mark.parametrize("fps", [1e-30, 1e30])
def test_a_rate_far_from_any_is_read(prepare, tmp_path, fps):
    features = {"video": VIDEO, "prompt": TEXT, "fps": tfds.features.Scalar(dtype=np.float32)}
    prepare(features, {"train": [{"video": grays(4), "prompt": "p", "fps": fps}]})
    assert source(tmp_path).load(0, np.random.default_rng(0)).video.shape == (3, 8, 8, 3)


def test_a_video_without_frames_is_a_bad_clip(prepare, tmp_path):
    prepare({"video": VIDEO, "prompt": TEXT}, {"train": [{"video": grays(0), "prompt": "p"}]})
    with pytest.raises(BadClipError, match=r"tfds:clips/train\[0\]: its video is empty: \[0, 8, 12, 3\]"):
        source(tmp_path).load(0, None)


@pytest.mark.slow
def test_does_not_import_tensorflow(prepare, tmp_path):
    prepare({"video": VIDEO, "prompt": TEXT}, {"train": [{"video": grays(4), "prompt": "p"}]})
    code = """
import sys
from rise_jax.data.tfds_source import TfdsSource
source = TfdsSource("clips", path=sys.argv[1], frames=3, height=8, width=8, fps=10)
print(source.load(0, None).video.shape, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "(3, 8, 8, 3) False\n", done.stderr
