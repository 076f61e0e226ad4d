"""Trains with TRL's GKDTrainer and prints its CPU seconds; run by an interpreter that has trl 1.16.0.

python _trl_gkd.py TEACHER STUDENT DATA.jsonl STEPS BATCH
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def main() -> None:
    teacher, student, data, steps, batch = sys.argv[1:]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = CHAT
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as out:
        config = GKDConfig(
            output_dir=out,
            max_steps=int(steps),
            per_device_train_batch_size=int(batch),
            learning_rate=1e-3,
            lmbda=1.0,
            beta=0.5,
            max_new_tokens=64,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=int(steps),
            gradient_checkpointing=False,
        )
        trainer = GKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"messages": turns}),
        )
        started = time.process_time()
        trainer.train()
        print(f"{time.process_time() - started:.1f}")


if __name__ == "__main__":
    main()
