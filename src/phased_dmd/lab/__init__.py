"""What measures, claims and teaches; nothing that distils, samples, exports or plans imports it."""
