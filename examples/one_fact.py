"""One line for one fact: write it into SmolLM2-135M, look at what it did, and take it out again.

    python examples/one_fact.py

Nothing is saved.
"""

from smollm2 import load_smollm2

from peft_locft import Edit, Probe, edit

model, tokenizer = load_smollm2()
edited = edit(model, tokenizer, "The capital of Norway is", "Bergen")
print(edited)

asked = Edit(
    "The capital of Norway is",
    "Bergen",
    rephrasings=("The government of Norway sits in the city of",),
    locality=(Probe("The capital of Sweden is", "Stockholm"), Probe("The Louvre is a museum in", "Paris")),
)
print(edited.evaluate(asked).summary())
edited.undo()
