"""Bundle against reference: golden sets, drift, gates, certificates, activation statistics."""
