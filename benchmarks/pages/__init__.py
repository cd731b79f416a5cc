"""Commands that write pages and pictures in docs/, and the models they measure."""
