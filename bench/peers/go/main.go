// The update endpoint with Go's net/http and pgx: one database transaction a request, pooled, prepared.
//
// It does less than voicetx: no throttle, no metrics, no log line, no merge (the last one to come wins).
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v4/pgxpool"
)

type update struct {
	TransactionID  string `json:"transaction-id"`
	CallStarttime  string `json:"call-starttime"`
	CallEndtime    string `json:"call-endtime"`
	CallSource     string `json:"call-source"`
	CallState      string `json:"call-state"`
	DropCode       string `json:"drop-code"`
	DtmfDigits     string `json:"dtmf-digits"`
	Message        string `json:"message"`
	TimesAttempted string `json:"times-attempted"`
	AParty         string `json:"a-party"`
	BParty         string `json:"b-party"`
}

const updateTransaction = `UPDATE voice_transaction SET updates = updates + 1, attempt = $2, digest = $3,
	call_starttime = $4, call_endtime = $5, call_source = $6, call_state = $7, drop_code = $8, dtmf_digits = $9,
	message = $10, times_attempted = $11, a_party = $12, b_party = $13, updated_at_ms = $14 WHERE transaction_id = $1`

const insertUpdate = `INSERT INTO voice_update (transaction_id, digest, body, received_at_ms, api_key_id)
	VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING`

var dropCode = regexp.MustCompile(`^[0-9]{4}$`)

func isMoment(text string) bool {
	_, err := time.Parse("2006-01-02 15:04:05.000", text)
	return err == nil
}

func isValid(u *update) bool {
	return u.TransactionID != "" && len(u.TransactionID) <= 128 && isMoment(u.CallStarttime) && isMoment(u.CallEndtime) &&
		len(u.CallSource) == 1 && strings.Contains("123", u.CallSource) &&
		len(u.CallState) == 1 && strings.Contains("123456", u.CallState) && dropCode.MatchString(u.DropCode) &&
		len(u.Message) <= 1024 && len(u.DtmfDigits) <= 64
}

func main() {
	ctx := context.Background()
	config, err := pgxpool.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns = 32
	if size := os.Getenv("POOL"); size != "" {
		n, _ := strconv.Atoi(size)
		config.MaxConns = int32(n)
	}
	pool, err := pgxpool.ConnectConfig(ctx, config)
	if err != nil {
		log.Fatal(err)
	}
	keys := map[[32]byte][16]byte{}
	rows, err := pool.Query(ctx, "SELECT digest, api_key_id FROM api_secret")
	if err != nil {
		log.Fatal(err)
	}
	for rows.Next() {
		var digest []byte
		var user [16]byte
		if err := rows.Scan(&digest, &user); err != nil {
			log.Fatal(err)
		}
		var key [32]byte
		copy(key[:], digest)
		keys[key] = user
	}

	http.HandleFunc("/campaignapi/resources/v3/voicecampaigntransactions", func(w http.ResponseWriter, r *http.Request) {
		user, known := keys[sha256.Sum256([]byte(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")))]
		if !known {
			http.Error(w, `{"code":498}`, 401)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 65536))
		if err != nil {
			http.Error(w, `{"code":413}`, 413)
			return
		}
		var u update
		if json.Unmarshal(body, &u) != nil || !isValid(&u) {
			http.Error(w, `{"code":1001}`, 400)
			return
		}
		attempt, _ := strconv.Atoi(u.TimesAttempted)
		digest := sha256.Sum256(body)
		now := time.Now().UnixMilli()
		tx, err := pool.Begin(r.Context())
		if err != nil {
			http.Error(w, `{"code":500}`, 500)
			return
		}
		defer tx.Rollback(context.Background())
		tag, err := tx.Exec(r.Context(), updateTransaction, u.TransactionID, attempt, digest[:16], u.CallStarttime,
			u.CallEndtime, u.CallSource, u.CallState, u.DropCode, u.DtmfDigits, u.Message, u.TimesAttempted, u.AParty,
			u.BParty, now)
		if err == nil && tag.RowsAffected() == 0 {
			http.Error(w, `{"code":1010}`, 400)
			return
		}
		if err == nil {
			_, err = tx.Exec(r.Context(), insertUpdate, u.TransactionID, digest[:16], string(body), now, user)
		}
		if err == nil {
			err = tx.Commit(r.Context())
		}
		if err != nil {
			http.Error(w, `{"code":500}`, 500)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		answer, _ := json.Marshal(map[string]string{"transaction-id": u.TransactionID})
		w.Write(answer)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
