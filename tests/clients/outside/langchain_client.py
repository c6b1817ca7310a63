"""langchain_client.py URL: what a LangChain user does; prints one JSON object."""

import json
import sys

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

url = f"{sys.argv[1]}/v1"
guidance = {"method": "pargs", "reward_model": "first", "beta": 1.5}
fixed = {"base_url": url, "api_key": "none", "max_retries": 0, "max_tokens": 8, "temperature": 0, "seed": 3}
messages = [HumanMessage("hello there")]

guided = ChatOpenAI(model="base", extra_body={"guidance": guidance}, **fixed)
preset = ChatOpenAI(model="base:steered", **fixed)
plain = ChatOpenAI(model="base", **fixed)
print(
    json.dumps(
        {
            "guided": guided.invoke(messages).content,
            "streamed": "".join(chunk.content for chunk in guided.stream(messages)),
            "preset": preset.invoke(messages).content,
            "batch": [answer.content for answer in preset.batch([messages, messages])],
            "plain": plain.invoke(messages).content,
        }
    )
)
