"""The figures of the pages, as SVG."""
