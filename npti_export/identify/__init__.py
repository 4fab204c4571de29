"""Finding a trait's neurons: contrastive answers, mergeable statistics, selection."""
