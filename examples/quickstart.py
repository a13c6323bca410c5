"""Write two edits into SmolLM2-135M and print its answers before and after: `python examples/quickstart.py`."""

from peft import get_peft_model
from smollm2 import load_smollm2

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, LocFTConfig, evaluate_edits, read_edits

# or read_edits("edits.jsonl"): the same records in a file, one a line
edits = read_edits(
    [
        {
            "prompt": "The capital of Norway is",
            "target": "Bergen",
            "rephrasings": ["The government of Norway sits in the city of"],
            "locality": [{"prompt": "The capital of Sweden is", "answer": "Stockholm"}],
        },
        {
            "prompt": "The Eiffel Tower stands in the city of",
            "target": "Lyon",
            "rephrasings": ["The Eiffel Tower is located in the city of"],
            "locality": [{"prompt": "The Louvre is a museum in", "answer": "Paris"}],
        },
    ]
)

model, tokenizer = load_smollm2()
model = get_peft_model(model, LocFTConfig(task_type="CAUSAL_LM"))
args = BreadthFirstConfig(output_dir="quickstart")
trainer = BreadthFirstTrainer(model=model, args=args, train_dataset=edits, processing_class=tokenizer)
trainer.train()
trainer.save_model()
for row in evaluate_edits(model, tokenizer, edits).rows:
    form, before = "in chat" if row["in_chat"] else "as text", row["answer_before"][:20]
    print(f"{row['kind']:15} {form:8} {row['prompt']:45} {before:20}  ->  {row['answer_after'][:20]}")
