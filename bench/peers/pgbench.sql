\set id random(0, :ids - 1)
\set ms random(0, 999)
\set digest random(0, 9000000000000000000)
BEGIN;
UPDATE voice_transaction SET updates = updates + 1, attempt = 1, digest = decode(lpad(to_hex(:digest::bigint), 32, '0'), 'hex'), call_starttime = '2026-03-01 09:00:00.000', call_endtime = '2026-03-01 09:10:10.' || :ms::text, call_source = '2', call_state = '5', drop_code = '2005', dtmf_digits = '1', message = 'Call finished ' || :digest::text, times_attempted = '1', a_party = '+15550100', b_party = '+15550199', updated_at_ms = 1772352000000 WHERE transaction_id = 't' || :id::text;
INSERT INTO voice_update (transaction_id, digest, body, received_at_ms, api_key_id) VALUES ('t' || :id::text, decode(lpad(to_hex(:digest::bigint), 32, '0'), 'hex'), '{"transaction-id":"t' || :id::text || '","call-starttime":"2026-03-01 09:00:00.000","call-endtime":"2026-03-01 09:10:10.' || :ms::text || '","call-source":"2","call-state":"5","drop-code":"2005","dtmf-digits":"1","message":"Call finished ' || :digest::text || '","times-attempted":"1","a-party":"+15550100","b-party":"+15550199"}', 1772352000000, '6d0b1f0e-2f0e-4a63-9d84-6b9a3a1f0c55') ON CONFLICT DO NOTHING;
COMMIT;
