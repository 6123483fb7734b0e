"""The bound: a FastAPI endpoint that does nothing, under uvicorn as it comes."""

from fastapi import FastAPI

app = FastAPI()


@app.put("/campaignapi/resources/v3/voicecampaigntransactions")
async def update() -> dict[str, str]:
    """Answer without having looked."""
    return {"transaction-id": "demo-001"}
