"""Text in, token batches out; what an answer is and when two are equal. Imports no accelerator library."""
