"""What can go: a sequence of removals chosen by the true loss, beside what cheaper rules choose; and how to build what is left."""
