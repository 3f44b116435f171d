"""Stage 1: the Rephrasing Adapter learns to condition the video model, on single frames (method of arXiv 2511.04317, Fig. 2b).

    python main.py --config=configs/stage1.py            # preset tiny: rendered scenes, embedded LLM, 2 CPU cores
    python main.py --config=configs/stage1.py:small      # one GPU

From-scratch presets train the DiT along with the adapter (`model.trainable`): an adapter on a random frozen DiT learns nothing.
Cost and expected loss of `tiny`: docs/tiny.md.
"""

from ml_collections import ConfigDict

from configs.presets import preset as preset_row


def get_config(preset: str = "tiny") -> ConfigDict:
    row = preset_row(preset or "tiny")
    config = ConfigDict()
    config.run = dict(
        stage="stage1",
        preset=preset or "tiny",
        steps=0,
        batch_size=0,  # global: over all devices and processes
        accumulate=1,  # parts of a batch that go through the model one after the other, for the memory of one
        save_every=500,  # steps
        keep=2,  # checkpoints
        profile="",  # START:STOP traces the steps START+1 to STOP into WORKDIR/profile, for xprof
        seed=0,
        init_from="",  # a workdir to start from (its EMA), or a stage name: that stage's default workdir, when it is there
    )
    config.data = dict(
        source="scenes",  # scenes | folder | tfds:NAME
        path="",  # folder: the directory of clips and metadata; tfds: its data_dir
        split="train",
        frames=1,  # 4n+1
        height=0,
        width=0,
        fps=8.0,
        texts=0,  # scenes: unique (prompt, rephrased) pairs
        states="cached",  # cached: LLM states once per unique text; in_step: teacher forcing in every step
        workers=0,  # loader processes; 0 = threads
        max_bad=0.01,  # fraction of unreadable clips that stops the run
    )
    config.model = dict(
        condition="rephrase",  # rephrase | encode | rewrite_then_encode | native: Figure 1 (c), (a), (b), (a) of the paper
        llm={},
        adapter={},
        dit={},
        vae=dict(  # or a Wan VAE: its folder or .safetensors file, and what it computes in
            path="pixels",
            dtype="float32",
            tile=0,  # side of the pieces, in pixels, in which it works on large frames to save memory; 0: whole
        ),
        native=dict(
            path="", length=512, dtype="bfloat16"
        ),  # a T5 or umT5 encoder: its folder, and the most tokens of a text
        calibrate="",  # a file of captions, one a line: the native encoder's mean and spread over them start the adapter's output
        null="learned",  # the condition of "no prompt": learned, native (the encoder's own), or a .safetensors file
        dtype="",  # of matrix products; what trains, norms and softmax stay float32
        attention="auto",  # auto | xla | cudnn (CUDA GPUs) | splash (TPUs)
        sequence="auto",  # attention of a sequence that lies over mesh.context: auto | ulysses | ring
        trainable=(".",),  # path patterns (re.search); the rest is frozen
        prediction="data",  # what the DiT predicts: data | velocity
        shift=8.0,  # of the time axis towards noise, in training and sampling: clips of a few pixels are readable until t = 0.9
    )
    config.optim = dict(
        learning_rate=0.0,
        warmup=30,  # steps
        decay_from=0,  # linear decay to 1 % between these two steps; 0, 0 = constant
        decay_until=0,
        weight_decay=0.01,
        clip=1.0,  # global gradient norm
        kind="adamw",  # adamw | muon
        b2=0.99,
        ema=0.999,
        drop=0.1,  # of conditions, replaced by the null condition
        time_mean=0.0,  # t = sigmoid(time_mean + time_std * normal), then shifted
        time_std=1.4,
    )
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)  # -1 = fill from the devices
    config.sample = dict(
        prompts="",  # a text, several joined by ||, or a file with one a line
        seed=0,
        steps=20,
        guidance=2.0,
        stepper="euler",  # euler | heun | unipc
        frames=0,  # 0: as the run's clips; so are height and width
        height=0,
        width=0,
        batch_size=32,  # videos at a time
        count=96,  # held-out prompts of --mode=evaluate
        temperature=0.0,  # of the rephrasing; 0 = greedy
        beside="",  # workdirs of other runs, several joined by ||: --mode=generate gives them the same prompts and seeds
    )
    for group in ("model", "data", "optim", "sample"):
        config[group].update(row[group])
    set_stage(config, row["stage1"])
    return config


def set_stage(config: ConfigDict, stage: dict) -> None:
    """What a preset's row says for one stage."""
    config.run.update(steps=stage["steps"], batch_size=stage["batch_size"])
    decay_from, decay_until = stage["decay"]
    config.optim.update(learning_rate=stage["learning_rate"], decay_from=decay_from, decay_until=decay_until)
    config.optim.drop = stage.get("drop", config.optim.drop)
    config.model.trainable = stage.get("trainable", config.model.trainable)
    if "low_rank" in stage:
        config.model.dit.low_rank = stage["low_rank"]
