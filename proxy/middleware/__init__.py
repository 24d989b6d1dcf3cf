"""The stations that every request of the data listener passes, outermost first."""

from proxy.middleware.auth import auth
from proxy.middleware.cors import cors
from proxy.middleware.errors import errors
from proxy.middleware.guard import guard
from proxy.middleware.limits import limits
from proxy.middleware.observe import observe
from proxy.middleware.request_id import request_id
from proxy.middleware.turn import turn

#: The chain, in order (house rule: a middleware never imports another).
CHAIN = (request_id, observe, errors, turn, guard, cors, auth, limits)
