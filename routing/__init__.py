"""What every node knows of the others: messages, links, regions, models, and how to choose."""
