"""A comparison of methods: what is compared, what each came to, and the table that says so. No Ray here."""
