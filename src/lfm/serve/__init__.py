"""Models behind a server of one's own: the OpenAI protocol for text, `/predict` for classifiers.

| module       | what it does                                                          |
|--------------|-----------------------------------------------------------------------|
| `run.py`     | checks what was asked, takes the port, opens the models, serves       |
| `app.py`     | the addresses that answer, and what each of them does                 |
| `guard.py`   | who may ask: token, host names, size of a request                     |
| `asked.py`   | what a request may say                                                |
| `answers.py` | how answers look, whole and in pieces                                 |
| `predict.py` | texts and pictures for classifiers                                    |
| `work.py`    | one model, one thread, one batch at a time                            |
| `faults.py`  | what goes wrong, in the shape that clients of this protocol know      |

Nothing here is imported before somebody serves: FastAPI and uvicorn come with `pip install learn-from-model[serve]`.
"""
