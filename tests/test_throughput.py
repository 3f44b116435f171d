import pytest

from rise_jax.throughput import Work, peak_tflops


def test_rates_by_hand():
    """Two devices do 8 TFLOP in 2 seconds: 2 TFLOP/s each, a fifth of their peak of 10."""
    work = Work(samples=4, frames=36, tokens=72, flops=8 * 10**12, devices=2, peak=10.0)
    assert work.rates(2.0) == {
        "samples_per_second": 2.0,
        "frames_per_second": 18.0,
        "tokens_per_second": 36.0,
        "tflops_per_device": 2.0,
        "mfu": pytest.approx(0.2),
    }
    assert "mfu" not in work._replace(peak=None).rates(2.0)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5", 459.0),
        ("TPU v6 lite", 918.0),
        ("TPU7x", 1153.5),
    ],
)
def test_a_device_is_known_by_its_whole_name(kind, peak):
    assert peak_tflops(kind) == peak


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 2g.10gb", "Tesla T4"]
)
def test_a_device_that_is_not_in_the_table_has_no_peak(kind):
    assert peak_tflops(kind) is None
