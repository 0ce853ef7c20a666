// Gives the editors their words: those that ComfyUI's page itself reads, of this pack's locales/.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { speak } from "./words.js";

const SETTING = "Comfy.Locale";

app.registerExtension({
  name: "montage.language",
  async init() {
    const languages = await api
      .fetchApi("/i18n")
      .then((answer) => answer.json())
      .catch(() => ({})); // English
    const follow = (language) => speak(languages[language]?.montage);
    follow(app.extensionManager.setting.get(SETTING));
    // The page loads the workflow anew then, and its editors with it.
    app.ui.settings.addEventListener(`${SETTING}.change`, ({ detail }) => follow(detail.value));
  },
});
