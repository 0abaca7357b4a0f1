"""An OpenAI-compatible server over `ArcModel`, requests for other engines, and adapters for RAG frameworks."""
