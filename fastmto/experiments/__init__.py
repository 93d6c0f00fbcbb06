"""The command line and what it needs: data, models, training, tables, plots."""
