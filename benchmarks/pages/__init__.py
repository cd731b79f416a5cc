"""Writers of pages and pictures in docs/."""
