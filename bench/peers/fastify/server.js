// The update endpoint with Fastify and node-postgres: one database transaction a request, pooled, prepared.
//
// It does less than voicetx: no throttle, no metrics, no log line, no merge (the last one to come wins).
const { createHash } = require("node:crypto");
const fastify = require("fastify")();
const { Pool } = require("pg");

const pool = new Pool({ connectionString: process.env.DATABASE_URL, max: Number(process.env.POOL || 20) });
const keys = new Map();

const updateTransaction = {
  name: "update",
  text: `UPDATE voice_transaction SET updates = updates + 1, attempt = $2, digest = $3, call_starttime = $4,
    call_endtime = $5, call_source = $6, call_state = $7, drop_code = $8, dtmf_digits = $9, message = $10,
    times_attempted = $11, a_party = $12, b_party = $13, updated_at_ms = $14 WHERE transaction_id = $1`,
};
const insertUpdate = {
  name: "insert",
  text: `INSERT INTO voice_update (transaction_id, digest, body, received_at_ms, api_key_id)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING`,
};
const moment = "^\\d{4}-\\d\\d-\\d\\d \\d\\d:\\d\\d:\\d\\d\\.\\d{3}$";
const schema = {
  body: {
    type: "object",
    required: ["transaction-id", "call-starttime", "call-endtime", "call-source", "call-state", "drop-code"],
    properties: {
      "transaction-id": { type: "string", minLength: 1, maxLength: 128 },
      "call-starttime": { type: "string", pattern: moment },
      "call-endtime": { type: "string", pattern: moment },
      "call-source": { enum: ["1", "2", "3"] },
      "call-state": { enum: ["1", "2", "3", "4", "5", "6"] },
      "drop-code": { type: "string", pattern: "^\\d{4}$" },
      "dtmf-digits": { type: "string", pattern: "^[0-9*#A-D]{1,64}$" },
      message: { type: "string", maxLength: 1024 },
      "times-attempted": { type: "string", pattern: "^\\d{1,4}$" },
      "a-party": { type: "string", maxLength: 32 },
      "b-party": { type: "string", maxLength: 32 },
    },
  },
};

fastify.put("/campaignapi/resources/v3/voicecampaigntransactions", { schema }, async (request, reply) => {
  const credential = (request.headers.authorization || "").replace("Bearer ", "");
  const user = keys.get(createHash("sha256").update(credential).digest("hex"));
  if (!user) return reply.code(401).send({ code: 498 });
  const u = request.body;
  const text = JSON.stringify(u);
  const digest = createHash("sha256").update(text).digest().subarray(0, 16);
  const now = Date.now();
  const client = await pool.connect();
  try {
    await client.query("BEGIN");
    const updated = await client.query({
      ...updateTransaction,
      values: [u["transaction-id"], Number(u["times-attempted"] || 0), digest, u["call-starttime"], u["call-endtime"],
        u["call-source"], u["call-state"], u["drop-code"], u["dtmf-digits"], u.message, u["times-attempted"],
        u["a-party"], u["b-party"], now],
    });
    if (updated.rowCount === 0) {
      await client.query("ROLLBACK");
      return reply.code(400).send({ code: 1010 });
    }
    await client.query({ ...insertUpdate, values: [u["transaction-id"], digest, text, now, user] });
    await client.query("COMMIT");
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  } finally {
    client.release();
  }
  return { "transaction-id": u["transaction-id"] };
});

async function main() {
  const found = await pool.query("SELECT encode(digest, 'hex') AS digest, api_key_id FROM api_secret");
  for (const row of found.rows) keys.set(row.digest, row.api_key_id);
  await fastify.listen({ host: "127.0.0.1", port: Number(process.env.PORT) });
}

main();
