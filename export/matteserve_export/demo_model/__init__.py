"""The bundled demonstration model: generated scenes with exact alpha, its training and its evaluation."""
