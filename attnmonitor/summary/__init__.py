"""What a run comes to, in words: verdict, tables, outliers, names and colors."""
