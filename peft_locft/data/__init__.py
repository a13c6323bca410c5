"""What is trained on, as text and as rows: edits, variants of them, facts to keep."""
