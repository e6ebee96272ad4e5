"""Teaching a model to cite its sources: data, collators, Fusion-in-Decoder, and the evaluation."""
