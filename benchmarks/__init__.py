"""Time and memory, measured side by side. See README.md; run from the root of the repository."""
