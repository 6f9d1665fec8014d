"""Looking inside trained models: what `laver inspect` measures, from where, and the page that shows it."""
