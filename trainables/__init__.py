"""Models, their data and their training loop; independent of Ray and the search engine."""
