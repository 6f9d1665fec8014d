"""From the result folders of lmms-eval and VLMEvalKit to one table, and the score of predicted masks."""
